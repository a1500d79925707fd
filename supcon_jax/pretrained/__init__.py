"""The encoder of another run, or of another program, and the features that it gives."""
