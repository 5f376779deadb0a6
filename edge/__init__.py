"""What request.py needs, one concept a file."""
