"""What a request's text is made of: the decoding loops on numpy arrays, their random numbers, the layout of text on
a canvas. It knows neither backends' runtimes nor requests' transport.
"""
