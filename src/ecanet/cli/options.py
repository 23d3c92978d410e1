"""Options that several verbs have."""

CONFIG_HELP = (
    "A recipe: YAML with the blocks model, data, optim, trainer. Later options on the command line override it."
)
BUILD_HELP = "module:function of your own that built the network, as fit had it; a checkpoint calls none by itself."
