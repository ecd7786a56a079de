"""Events: bytes to a validated event in normal form, and events to CSV rows. Pure: no clock, no randomness, no I/O.

Normal form: the contract's members in the contract's order, nothing else; ids are strings, `prob` is a float, all
strings are valid Unicode; as bytes it is compact JSON. The producer publishes it, and an event in normal form
validates to an equal one.
"""
