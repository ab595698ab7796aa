"""One plain function a technique, applied to the model from outside."""
