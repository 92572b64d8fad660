"""How a union is served: one ``Operations`` class and the sessions that drive it."""
