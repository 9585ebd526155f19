"""The mathematics: U-Net, noise schedules, samplers, training and evaluation. Imports nothing from service/."""
