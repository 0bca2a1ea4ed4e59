"""Training, evaluation and prediction, and the folders they leave."""
