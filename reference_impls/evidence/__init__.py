"""What claims measure, beside the methods: the functions that papers/<id>.yaml names, one module a method.

A method's module keeps them at its end while it is small (about 250 lines). Where a module of its name is here, all
functions that its claims name are here.
"""
