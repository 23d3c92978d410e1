"""The table of all verbs. To add a verb, add an entry here and a module of that name to this package.

The module has ``add(parser)``, which adds the options and returns the function that runs the verb with their values. It
may have ``prepare(words)``, which changes the words of the command line before they are parsed. It is imported only for
its own verb, so it may import everything it needs at its top.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """A verb's text in the overview and the help, and its kind of parser.

    Attributes:
        what: What it does, in a sentence.
        example: An example of a command.
        needs_extras: Whether it needs more than torch and torchvision. Its parser is then jsonargparse's, which reads
            recipes.
    """

    what: str
    example: str
    needs_extras: bool = True


VERBS = {
    "fit": Verb(
        "Train a network by a recipe.",
        "ecanet fit --config recipes/small/fashion_mnist.yaml --out runs/fashion --optim.epochs 2",
    ),
    "validate": Verb(
        "Accuracy of a trained network, overall and class by class.",
        "ecanet validate runs/fashion --confusion confusion",
    ),
    "predict": Verb("Classify image files.", "ecanet predict runs/fashion photo.png --top 3"),
    "explain": Verb(
        "Draw what a network sees in an image: classes, and the gates of each layer against those of their class.",
        "ecanet explain runs/fashion photo.png --out explained.png",
    ),
    "demo": Verb(
        "Train a small ResNet with no gate, SE and ECA on embedded pictures; prints a table and draws pictures.",
        "ecanet demo --seeds 3 --out runs/demo",
    ),
    "study": Verb(
        "Train the same network with several gates and seeds, and compare the results.",
        "ecanet study --data.root photos --gates none,se,eca --seeds 9 --out runs/study",
    ),
    "report": Verb(
        "Write the report of a study, one HTML file; a study also writes it when it ends.",
        "ecanet report runs/study",
    ),
    "insert": Verb(
        "Insert gates into a network of torchvision or timm, and show where they go and what they cost.",
        "ecanet insert --model torchvision/resnet50 --where block --report --save resnet50_eca.pt",
        needs_extras=False,
    ),
    "list": Verb(
        "The networks that fit, study and insert can name, and trained weights for them.",
        "ecanet list torchvision resnet50",
        needs_extras=False,
    ),
    "profile": Verb(
        "What networks cost here: parameters, multiply-adds, time, memory, share of the gates; the paper's Table 3.",
        "ecanet profile eca_resnet50 timm/resnet50d --gates none,eca,se --no-time",
        needs_extras=False,
    ),
    "gates": Verb(
        "Every gate: its formula, parameters, needs, neutral start and source.",
        "ecanet gates gct grn",
        needs_extras=False,
    ),
    "build": Verb("Build the C++ kernels for the CPU, in one to two minutes.", "ecanet build", needs_extras=False),
    "doctor": Verb("What runs on this machine, what does not, and why.", "ecanet doctor", needs_extras=False),
}
