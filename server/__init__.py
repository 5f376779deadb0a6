"""What handler.py needs. It ships in the archive with it, and is written for Python 3.9 as it is."""
