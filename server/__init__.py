"""What handler.py needs. It ships in the archive, and runs with Python 3.9."""
