"""The parts of the direct session: the device, mounting, the loop, and the handlers of requests."""
