"""Bodies of requests → what the engine is asked, with everything that is wrong with them.

One module each for the endpoints, and for what they share: `fields` reads values, `unsupported`
lists the fields that cannot be honored, `structure` and `tools` become grammars.
"""
