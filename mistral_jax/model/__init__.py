"""The Mistral model, in five short files that name no device.

Read `transformer.py` first: it explains the letters of all shapes and lists the parameters.
`layers.py` holds the parameters, `attention.py` the mask and the attention layer, `rope.py` the
rotary position embedding, and `cache.py` the key-value cache. `ops/` computes products and
attention on each backend.
"""
