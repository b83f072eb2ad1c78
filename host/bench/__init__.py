"""How fast the training host is: training against the baseline, one torch step. The edge measures itself in
`edge.measure`.
"""
