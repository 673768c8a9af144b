"""fledge trains EAGLE-3 draft heads: synthesize, dump, train, evaluate, export."""

__version__ = "0.1.0"
