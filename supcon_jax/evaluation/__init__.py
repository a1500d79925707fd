"""Evaluation of frozen models: knows nothing of training or configs."""
