"""Common knowledge: simple questions about the world, each with one answer."""

from __future__ import annotations

from random import Random

from .document import Item, generator

_TEXT = """
Why is the sky blue? | What makes the sky blue? => The air scatters the blue light of the sun.
Why do we sleep? | Why do people sleep? => We sleep because the body and the mind need rest.
Why do we eat? | Why do people eat? => We eat because food gives us energy.
Why do we drink water? | Why do people need water? => The body needs water to live.
Why do birds have wings? | What are wings for? => Birds have wings to fly.
Why do leaves fall in autumn? | Why do trees lose their leaves? => Trees lose their leaves to save
  water in winter.
Why does it rain? | Where does rain come from? => Clouds get heavy with water, and the water falls
  as rain.
Why is it dark at night? | Why is the night dark? => At night the sun shines on the other side of
  the earth.
Why do we have seasons? | What causes the seasons? => We have seasons because the earth is tilted on
  its way around the sun.
Why is the sea salty? | Why is sea water salty? => Rivers carry salt from the rocks into the sea.
Why do we wear clothes? | What are clothes for? => Clothes keep us warm and protect us.
Why do people laugh? | Why do we laugh? => People laugh when something is funny.
Why do people cry? | Why do we cry? => People cry when they are sad or in pain.
Why do we brush our teeth? | Why should I brush my teeth? => We brush our teeth to keep them clean
  and healthy.
Why do cats catch mice? | Why do cats hunt mice? => Cats catch mice because they eat them.
Why do bees visit flowers? | What do bees do on flowers? => Bees visit flowers to collect nectar.
What do plants need? | What do plants need to grow? => Plants need light, water and air.
What do cows eat? | What does a cow eat? => Cows eat grass.
What do rabbits eat? | What does a rabbit eat? => Rabbits eat grass and leaves.
What do lions eat? | What does a lion eat? => Lions eat meat.
What do birds eat? | What does a bird eat? => Birds eat seeds, fruit and insects.
What do bees make? | What do we get from bees? => Bees make honey.
What do cows give us? | What do we get from cows? => Cows give us milk.
What do sheep give us? | What do we get from sheep? => Sheep give us wool.
What do hens lay? | What do we get from hens? => Hens lay eggs.
What is bread made of? | How is bread made? => Bread is made of flour and water.
What is cheese made of? | How is cheese made? => Cheese is made of milk.
What is paper made of? | How is paper made? => Paper is made of wood.
What is glass made of? | How is glass made? => Glass is made of sand.
What is wine made of? | How is wine made? => Wine is made of grapes.
What is ice? | What is ice made of? => Ice is frozen water.
What is steam? | What becomes of boiling water? => Boiling water becomes steam.
Is the sun a star? | What kind of thing is the sun? => The sun is a star.
What goes around the earth? | What does the moon do? => The moon goes around the earth.
What is the earth? | What do we live on? => The earth is the planet on which we live.
What is a year? | How long is a year? => A year is the time in which the earth goes around the sun.
What is a day? | How long is a day? => A day has 24 hours.
What is money for? | What do we need money for? => We need money to buy things.
What is a school for? | What do children do at school? => Children learn at school.
What is a doctor for? | Who helps sick people? => A doctor helps sick people.
What is a book for? | What do we do with books? => We read books.
What do you do with a pen? | What is a pen for? => One writes with a pen.
What do you do with a key? | What is a key for? => One opens a lock with a key.
What do you do with scissors? | What are scissors for? => One cuts with scissors.
What do we hear with? | What are ears for? => We hear with our ears.
What do we see with? | What are eyes for? => We see with our eyes.
What do we smell with? | What is a nose for? => We smell with our nose.
What do we taste with? | What is the tongue for? => We taste with our tongue.
What do we think with? | What is the brain for? => We think with our brain.
What does the heart do? | What is the heart for? => The heart moves the blood through the body.
What comes after winter? | Which season comes after winter? => After winter comes spring.
What comes after spring? | Which season comes after spring? => After spring comes summer.
What comes after summer? | Which season comes after summer? => After summer comes autumn.
What comes after autumn? | Which season comes after autumn? => After autumn comes winter.
Which season is the coldest? | When is it coldest? => Winter is the coldest season.
Which season is the warmest? | When is it warmest? => Summer is the warmest season.
What is the biggest animal? | Which animal is the biggest? => The biggest animal is the blue whale.
What is the fastest animal? | Which animal is the fastest on land? => The fastest animal on land is
  the cheetah.
What is the tallest animal? | Which animal is the tallest? => The tallest animal is the giraffe.
What is the biggest ocean? | Which ocean is the biggest? => The biggest ocean is the Pacific.
What is the highest mountain? | Which mountain is the highest? => The highest mountain is Mount
  Everest.
What is the biggest country? | Which country is the biggest? => The biggest country is Russia.
What is the longest river? | Which river is the longest? => The longest river is the Nile.
What is the biggest planet? | Which planet is the biggest? => The biggest planet is Jupiter.
Which planet is nearest to the sun? | What planet is next to the sun? => Mercury is nearest to the
  sun.
Which planet is red? | What is the red planet? => Mars is the red planet.
How many planets are there? | How many planets go around the sun? => There are 8 planets.
How many continents are there? | How many continents does the earth have? => There are 7 continents.
How many colors has a rainbow? | How many colors are in a rainbow? => A rainbow has 7 colors.
How many fingers do we have? | How many fingers does a person have? => A person has 10 fingers.
How many eyes do we have? | How many eyes does a person have? => A person has 2 eyes.
How many legs does a spider have? | How many legs has a spider? => A spider has 8 legs.
How many legs does an insect have? | How many legs has an insect? => An insect has 6 legs.
How many wheels does a car have? | How many wheels has a car? => A car has 4 wheels.
How many wheels does a bike have? | How many wheels has a bike? => A bike has 2 wheels.
How many sides does a triangle have? | How many sides has a triangle? => A triangle has 3 sides.
How many sides does a square have? | How many sides has a square? => A square has 4 sides.
How many letters are in the alphabet? | How many letters has English? => English has 26 letters.
How many seasons are there? | How many seasons does a year have? => A year has 4 seasons.
How many days does February have? | How long is February? => February has 28 days, or 29 in a leap
  year.
How many days does a year have? | How many days are in a year? => A year has 365 days, or 366 in a
  leap year.
Who wrote Hamlet? | Who wrote Romeo and Juliet? => William Shakespeare wrote it.
Who painted the Mona Lisa? | Whose picture is the Mona Lisa? => Leonardo da Vinci painted it.
Who was Albert Einstein? | What was Albert Einstein? => Albert Einstein was a great physicist.
Who was Mozart? | What was Mozart? => Mozart was a great composer.
Who was the first man on the moon? | Who first walked on the moon? => Neil Armstrong was the first
  man on the moon.
Where do fish live? | Where does a fish live? => Fish live in water.
Where do birds live? | Where does a bird live? => Birds live in trees, in nests.
Where do penguins live? | Where does a penguin live? => Penguins live in the south, where it is
  cold.
Where do camels live? | Where does a camel live? => Camels live in the desert.
Where does the sun rise? | Where does the sun come up? => The sun rises in the east.
Where does the sun set? | Where does the sun go down? => The sun sets in the west.
Where do we buy food? | Where can I buy food? => You can buy food at the market.
Where do we see a doctor? | Where are sick people helped? => Sick people are helped in a hospital.
Where can I borrow books? | Where can one borrow books? => You can borrow books at the library.
Where can I take a train? | Where do trains stop? => Trains stop at the station.
When do we eat breakfast? | When is breakfast? => We eat breakfast in the morning.
When do we eat dinner? | When is dinner? => We eat dinner in the evening.
When do stars shine? | When can we see the stars? => We can see the stars at night.
When does water freeze? | How cold is ice? => Water freezes at 0 degrees.
When does water boil? | How hot is boiling water? => Water boils at 100 degrees.
When is Christmas? | On which day is Christmas? => Christmas is on 25 December.
When does the year begin? | What is the first day of the year? => The year begins on 1 January.
Can birds fly? | Can all birds fly? => Yes, most birds can fly.
Can penguins fly? | Can a penguin fly? => No, penguins can not fly, but they can swim.
Can fish fly? | Can a fish walk? => No, a fish can only swim.
Can dogs talk? | Can a dog speak? => No, dogs can bark, but they can not talk.
Can people fly? | Can a person fly? => No, people can not fly without a plane.
Can cats swim? | Can a cat swim? => Yes, but most cats do not like water.
Can you see air? | Can we see air? => No, we can not see air, but we can feel the wind.
How hot is the sun? | Is the sun cold? => The sun is very hot.
Is snow cold? | Is snow hot? => Snow is cold.
Is sugar sweet? | Does sugar taste sour? => Sugar is sweet.
Is a lemon sweet? | How does a lemon taste? => A lemon is sour.
Is the earth flat? | Is the earth round? => The earth is round.
Is a whale a fish? | What kind of animal is a whale? => A whale is not a fish. It is a mammal.
Is a tomato a fruit? | Is a tomato a vegetable? => A tomato is a fruit, but we cook it like a
  vegetable.
Is water wet? | Is water dry? => Water is wet.
Is an elephant bigger than a mouse? | Is a mouse bigger than an elephant? => An elephant is bigger
  than a mouse.
Is a car faster than a bike? | Is a bike faster than a car? => A car is faster than a bike.
Is gold heavier than wood? | Is wood heavier than gold? => Gold is heavier than wood.
How do fish breathe? | How can fish breathe in water? => Fish breathe with gills.
How do plants drink? | How do trees drink? => Plants drink with their roots.
How do you make tea? | How is tea made? => Put tea leaves into hot water and wait a few minutes.
How do you cook an egg? | How do I cook an egg? => Put the egg into boiling water for some minutes.
How can I sleep better? | How do I sleep well? => Go to bed early and do not drink coffee at night.
How can I learn better? | How do I learn well? => Learn a little every day and get enough sleep.
How can I make friends? | How do I find friends? => Be kind, listen well and ask questions.
How can I stay healthy? | How do I stay healthy? => Eat well, sleep enough and move every day.
"""


def _parse() -> list[tuple[list[str], str]]:
    lines = _TEXT.strip().replace("\n  ", " ").split("\n")
    pairs = (line.split(" => ") for line in lines)
    return [(asks.split(" | "), reply) for asks, reply in pairs]


KNOWN = _parse()
_BEFORE = ("", "", "", "Tell me: ", "Please tell me: ", "A question: ", "I want to know: ")


def known(rng: Random) -> Item:
    """A question about the world, and its answer."""
    asks, reply = rng.choice(KNOWN)
    plain = rng.choice(asks)
    before = rng.choice(_BEFORE)
    ask = before + (plain[0].lower() + plain[1:] if before else plain)
    return Item(ask, reply, reply, reply[:-1], ("talk", ask))


knowledge = generator("knowledge", known, think=0.2, most=5, talk=True)
"""Simple questions about the world. What is held out is a question as it is worded."""
