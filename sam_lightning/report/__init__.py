"""``python -m sam_lightning.report FOLDER...``: from the folders of runs to tables and figures.

``runs.py`` reads what runs left behind, ``comparison.py`` says which of them repeat each other,
``statistics.py`` compares them, ``tables.py`` and ``figures.py`` show it. None of it needs torch.
"""

FORMATS = ("png", "svg", "pdf")  # of figures
