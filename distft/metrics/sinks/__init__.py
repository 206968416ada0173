"""Where figures go: a file for machines, a line for people, TensorBoard, Weights & Biases."""
