"""Dictionary dialogue: what everyday words mean, what kind of thing each is."""

from __future__ import annotations

from random import Random

from .document import Item, generator
from .needles import a_noun

# Kinds of things; what is asked about = what it is, where _ stands for the kind.
_MEANINGS = {
    "animal": """
        a dog = _ that barks and lives with people | a cat = a small _ that says meow and
        catches mice | a horse = a big _ that people can ride | a cow = a big _ that gives milk
        | a bird = _ that has wings and can fly | a fish = _ that lives in water | a sheep = _
        that gives wool | a lion = a big wild _ that roars | a tiger = a big wild _ with stripes
        | a bear = a big strong _ with thick fur | a wolf = a wild _ that looks like a dog | a
        fox = a wild _ with red fur and a long tail | a rabbit = a small _ with long ears | a
        mouse = a very small _ with a long tail | a frog = a small green _ that jumps | a duck =
        a bird that swims and says quack | a bee = a small _ that makes honey | an elephant = a
        very big gray _ with a trunk | a snake = a long _ without legs | a spider = a small _
        with eight legs
    """,
    "fruit": """
        an apple = a round _ that grows on a tree | a banana = a long yellow _ | an orange = a
        round _ full of juice | a lemon = a yellow _ that is sour | a cherry = a small red _
        with a stone inside | a grape = a small round _ that wine is made of | a pear = a sweet
        _ that grows on a tree | a peach = a soft sweet _ with a stone inside | a melon = a very
        big _ that is full of water | a strawberry = a small red _
    """,
    "place": """
        a school = _ where children learn | a market = _ where people buy and sell | a park = _
        with trees where people walk | a library = _ where people read and borrow books | a
        station = _ where trains stop | a museum = _ where people look at old things and art | a
        hospital = _ where sick people are helped | a kitchen = a room where people cook | a
        garden = _ where plants and flowers grow | a farm = _ where people grow food and keep
        animals | a beach = _ beside the sea with sand | a forest = _ with many trees | a city =
        _ where very many people live | a street = a road in a city | a bakery = _ where bread
        is made
    """,
    "tool": """
        a hammer = _ for hitting nails | a knife = _ for cutting | a spoon = _ for eating soup |
        a pen = _ for writing | a key = _ for opening a lock | a clock = _ that shows the time |
        a broom = _ for cleaning the floor | a lamp = _ that gives light | an umbrella = _ that
        keeps off the rain | a camera = _ for taking pictures | a phone = _ for talking to
        people far away | a map = a picture that shows where places are | a ladder = _ for
        climbing up | a needle = a thin _ for sewing | a basket = _ for carrying things
    """,
    "person": """
        a teacher = _ who teaches at a school | a doctor = _ who helps the sick | a farmer = _
        who grows food | a baker = _ who makes bread | a driver = _ who drives a car | a singer
        = _ who sings | a writer = _ who writes books | a painter = _ who paints pictures | a
        nurse = _ who cares for the sick | a pilot = _ who flies a plane | a cook = _ who
        prepares food | a lawyer = _ who knows the law | a king = a man who rules a country | a
        queen = a woman who rules a country | a child = a young _ | a friend = _ whom you like
    """,
    "vehicle": """
        a car = _ with four wheels and a motor | a bike = _ with two wheels that you move with
        your feet | a train = a long _ that runs on rails | a boat = a small _ that goes on
        water | a ship = a big _ that goes on the sea | a plane = _ that flies in the air | a
        bus = a big _ for many people
    """,
    "food": """
        bread = _ made of flour and water | cheese = _ made of milk | soup = hot _ that you eat
        with a spoon | honey = sweet _ made by bees | butter = soft yellow _ made of milk | a
        cake = a sweet _ for birthdays | an egg = _ that comes from a hen | rice = _ made of
        small white grains | salt = a white powder that makes food taste better | sugar = a
        white powder that makes food sweet
    """,
    "": """
        a river = water that flows to the sea | a lake = water with land all around it | the sea
        = very much salty water | a mountain = a very high hill | an island = land with water
        all around it | rain = water that falls from the clouds | snow = soft white ice that
        falls from the sky | wind = air that moves | a cloud = something white or gray in the
        sky that brings rain | the sun = the star that gives us light and warmth | the moon =
        the round light that we see at night | a star = a small light in the night sky | a tree
        = a tall plant with a trunk and leaves | a flower = the colored part of a plant | a
        desert = a dry land of sand
    """,
}


def _meanings() -> dict[str, tuple[str, str]]:
    """``"a dog"`` -> (its kind with an article, or nothing; what it is)."""
    out = {}
    for kind, text in _MEANINGS.items():
        with_article = kind if kind in ("food", "") else a_noun(kind)
        for entry in " ".join(text.split()).split(" | "):
            word, _, meaning = entry.partition(" = ")
            whole = with_article if meaning.startswith("_") else kind
            out[word] = with_article, meaning.replace("_", whole)
    return out


MEANINGS = _meanings()
_KINDS = sorted({kind for kind, _ in MEANINGS.values() if kind})
_DEFINE = (
    "What is {}?",
    "What is {}?",
    "Tell me what {} is.",
    "Do you know what {} is?",
    "Explain what {} is.",
    "Can you tell me what {} is?",
    "Please explain what {} is.",
)
_GUESS = ("What is {}?", "Which word means: {}?", "What do you call {}?", "Tell me the word: {}.")


def entry(rng: Random) -> Item:
    """A question about a word, and its answer."""
    word = rng.choice(list(MEANINGS))
    kind, meaning = MEANINGS[word]
    full = f"{word} is {meaning}."
    full = full[0].upper() + full[1:]
    r = rng.random()
    if r < 0.5:
        ask, reply = rng.choice(_DEFINE).format(word), full
    elif r < 0.7:
        ask = rng.choice(_GUESS).format(meaning)
        reply = f"That is {word}."
    else:
        asked = kind if kind and rng.random() < 0.5 else rng.choice(_KINDS)
        ask = rng.choice(("Is {} {}?", "Tell me: is {} {}?")).format(word, asked)
        reply = f"Yes, {word} is {kind}." if asked == kind else f"No, {full[0].lower()}{full[1:]}"
    return Item(ask, full, reply, reply[:-1], ("talk", ask))


dictionary = generator("dictionary", entry, think=0.3, talk=True)
"""What a word means, which word has a meaning, and whether something is of a kind. What is held
out is a question as it is worded; the words themselves are all learned."""
