"""Networks of other projects that are no UNet2DModel, under the parameter names of their files."""
