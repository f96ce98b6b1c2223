"""LowSSL's server: versions of encoders that replace each other safely, and REST that serves the current one."""
