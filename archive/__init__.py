"""What create_mar_file.py needs: the weights and labels that users have."""
