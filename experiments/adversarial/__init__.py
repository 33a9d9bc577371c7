"""What experiments with generators and critics share."""
