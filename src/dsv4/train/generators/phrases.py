"""The words v4-nano knows: few enough that most are one token, enough that none is the answer."""

from __future__ import annotations


def _table(text: str) -> dict[str, str]:
    """``"key:value key:value"``, with ``_`` for a space inside a value."""
    pairs = (pair.split(":") for pair in text.split())
    return {key: value.replace("_", " ") for key, value in pairs}


NAMES = (
    "Anna Ben Carla David Emma Frank Grace Henry Ivan Julia Kevin Laura Maria Nina Oscar Paul "
    "Rosa Sam Tom Vera Adam Bella Chris Diana Eric Fiona George Helen Jack Kate Leo Mia Noah "
    "Olivia Peter Ruth Simon Tina Victor Wendy Alice Bob Clara Daniel Eva Felix John Lisa Mark Sara"
).split()
OBJECTS = (
    "box book lamp chair table door window key cup bottle bag coat hat ring clock phone car boat "
    "bike train ball doll drum piano pen letter map coin stone garden house tower bridge ship tent "
    "basket mirror candle camera guitar"
).split()
COLORS = "red blue green yellow black white brown orange purple gray pink gold silver".split()
ANIMALS = (
    "dog cat horse cow bird fish sheep lion tiger bear wolf fox rabbit mouse frog duck"
).split()
FOODS = "apple banana orange lemon cherry grape pear peach plum melon mango tomato fig".split()
CITIES = "Paris London Rome Berlin Madrid Tokyo Cairo Oslo Lima Vienna Athens Dublin Moscow".split()
JOBS = "teacher doctor farmer baker driver singer writer painter nurse pilot cook lawyer".split()
PLACES = "park market school river lake forest beach station library hill street museum".split()
ADJECTIVES = "small big old new happy quiet bright dark warm cold slow fast long short soft".split()
VERBS = "slept waited played walked sat ran stood rested sang worked".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
CAPITALS = _table(
    "France:Paris Italy:Rome Germany:Berlin Spain:Madrid England:London Ireland:Dublin "
    "Portugal:Lisbon Austria:Vienna Greece:Athens Norway:Oslo Sweden:Stockholm "
    "Finland:Helsinki Denmark:Copenhagen Poland:Warsaw Russia:Moscow Hungary:Budapest "
    "Belgium:Brussels Switzerland:Bern Netherlands:Amsterdam Iceland:Reykjavik "
    "Ukraine:Kyiv Romania:Bucharest Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb "
    "Turkey:Ankara Japan:Tokyo China:Beijing India:Delhi Thailand:Bangkok Vietnam:Hanoi "
    "Indonesia:Jakarta Iran:Tehran Iraq:Baghdad Israel:Jerusalem Jordan:Amman Syria:Damascus "
    "Lebanon:Beirut Nepal:Kathmandu Pakistan:Islamabad Egypt:Cairo Kenya:Nairobi "
    "Ghana:Accra Nigeria:Abuja Morocco:Rabat Tunisia:Tunis Libya:Tripoli Senegal:Dakar "
    "Ethiopia:Addis_Ababa Canada:Ottawa Mexico:Mexico_City Cuba:Havana Brazil:Brasilia "
    "Argentina:Buenos_Aires Chile:Santiago Peru:Lima Colombia:Bogota Venezuela:Caracas "
    "Ecuador:Quito Uruguay:Montevideo Bolivia:Sucre Australia:Canberra"
)
THINGS = _table(
    "sky:blue grass:green snow:white blood:red coal:black banana:yellow milk:white "
    "sun:yellow night:black lemon:yellow tomato:red chocolate:brown sea:blue leaf:green "
    "strawberry:red carrot:orange elephant:gray rose:red"
)
SOUNDS = _table(
    "dog:woof cat:meow cow:moo duck:quack sheep:baa horse:neigh lion:roar bird:tweet "
    "frog:croak mouse:squeak pig:oink wolf:howl bee:buzz snake:hiss"
)
OPPOSITES = _table(
    "big:small hot:cold day:night up:down left:right old:new fast:slow long:short happy:sad "
    "good:bad open:closed light:dark full:empty high:low early:late rich:poor hard:soft "
    "wet:dry strong:weak young:old yes:no in:out first:last clean:dirty"
)
OPPOSITES |= {b: a for a, b in OPPOSITES.items() if b not in OPPOSITES}
SYSTEM = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are v4-nano, a small model.",
    "Answer in short sentences.",
    "You are a helpful assistant. Be brief.",
    "Be kind and brief.",
)
WHO = (
    "I am v4-nano, a small DeepSeek-V4-architecture model.",
    "I am v4-nano, a small model with the DeepSeek-V4 architecture.",
    "My name is v4-nano. I am a small DeepSeek-V4-architecture model.",
)
