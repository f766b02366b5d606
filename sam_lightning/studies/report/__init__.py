"""``python -m sam_lightning report FOLDER...``: from the folders of runs to tables and figures.

``runs.py`` reads runs, ``comparison.py`` groups and compares them with ``statistics.py``,
``tables.py`` and ``figures.py`` show that, and ``files.py`` writes it. Nothing here needs torch.
"""
