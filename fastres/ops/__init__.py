"""The operators, a file each: schema, fake kernel, autograd formula, and which backend serves which device.

Schemas are defined here rather than in C++, so that the operators exist where nothing is compiled. A compiled backend
registers its kernels for its own dispatch key; whatever has none is served by `fastres.reference`.
"""
