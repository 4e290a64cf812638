"""How autograd sees a problem: functions (`autograd`), and the same as operators of a graph (`operators`).

Both modules have `prepare`, `divergences` and `one_pass`, with the same arguments and results.
"""
