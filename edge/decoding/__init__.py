"""Decoding on numpy arrays: the loops, their random numbers, the layout of text on a canvas. Knows neither the
backends' runtimes nor the requests' transport.
"""
