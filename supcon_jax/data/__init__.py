"""Images in, batches of augmented views out. TensorFlow is imported only when used."""
