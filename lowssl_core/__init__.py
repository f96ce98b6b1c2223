"""LowSSL's core: views, losses, methods, the training loop and the commands around them."""

__version__ = "0.1.0"
