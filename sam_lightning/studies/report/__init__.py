"""``python -m sam_lightning report FOLDER...``: runs to tables and figures, without torch."""
