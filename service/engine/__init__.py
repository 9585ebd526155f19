"""Row state on the device, how a forward pass is run, and what is measured before serving. Only here is torch used."""
