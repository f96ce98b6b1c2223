"""What the server speaks: requests in, answers and problems out."""
