"""What the direct session is made of: the device, mounting, the loop, and the handlers of requests."""
