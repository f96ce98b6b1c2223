"""LowSSL's client: devices that keep training the encoder on images that never leave them."""
