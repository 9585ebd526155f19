"""The figures of a model card, and checks that another executor or precision is no worse."""
