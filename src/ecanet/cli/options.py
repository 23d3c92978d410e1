"""Options that several verbs have."""

CONFIG_HELP = (
    "A recipe: YAML with the blocks model, data, optim, trainer. Later options on the command line override it."
)
