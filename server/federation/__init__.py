"""The federation: a SuperLink out of reach, devices that come and go, rounds that survive what happens to both."""
