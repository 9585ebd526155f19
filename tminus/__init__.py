"""tminus serves trained denoising diffusion U-Nets. Its parts are `tminus.service` and `tminus.model`.

In the repository they are the folders `service/` and `model/` beside this one, to which this one has links, so that an
installed tminus takes no name but its own.
"""
