"""What happens beside the training step: progress, saving, TensorBoard, sharpness."""
