"""Linear attention: a feature map instead of the softmax."""
