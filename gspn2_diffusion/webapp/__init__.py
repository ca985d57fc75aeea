"""The web page. ``gspn2 app`` and ``python app.py`` start it; importing this package loads nothing."""
