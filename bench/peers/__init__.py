"""What tminus is measured against, each a process of its own: what a careful user of that project would write."""
