"""The parts that the public modules are made of."""
