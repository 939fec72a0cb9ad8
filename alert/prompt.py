"""Write the meta-task instruction (section 3.3, appendix A, listing 1)."""

from __future__ import annotations

from collections.abc import Sequence

from common.types import CATEGORY

INSTRUCTION = """\
You are an image classifier. You are given a dataset containing images with their corresponding labels. When a user\
 provides an input image, your task is to classify it into one of the existing classes. Follow these steps:

1. Carefully examine and describe the dataset images, noting key details and characteristics of each class.
2. Analyze and describe the user input image in detail.
3. Compare the user input image with the dataset images:
 - Identify and highlight similarities between the input image and the images of each class.
 - Identify and highlight differences between the input image and the images not belonging to the chosen class.
4. Use your observations to determine the most appropriate class for the user input image, ensuring your reasoning is\
 clear and logical. Then provide your classification decision.

The reasoning process and answer are enclosed within <think></think> and <answer></answer> tags, respectively, i.e.,\
 <think>reasoning process here</think><answer>answer here</answer>.

Dataset images:
"""
# Our choice for models of half a million parameters: the same parts in fewer words.
SHORT = "Compare the user input image with the dataset images. Think in <think></think>, answer in <answer></answer>."
INSTRUCTIONS = {"paper": INSTRUCTION, "short": f"{SHORT}\n\nDataset images:\n"}


def meta_task(names: Sequence[str], instruction: str = "paper") -> str:
    """Return the text of a prompt; the image follows it.

    Args:
        names: Names of the reference categories, in order.
        instruction: Wording, `paper` or `short`.

    >>> print(meta_task(["six", "nine"], "short"))
    Compare the user input image with the dataset images. Think in <think></think>, answer in <answer></answer>.
    <BLANKLINE>
    Dataset images:
    <BLANKLINE>
    Class name: six <category>
    <BLANKLINE>
    Class name: nine <category>
    <BLANKLINE>
    User input image:
    """
    blocks = [f"\nClass name: {name} {CATEGORY}\n" for name in names]
    return f"{INSTRUCTIONS[instruction]}{''.join(blocks)}\nUser input image:"
