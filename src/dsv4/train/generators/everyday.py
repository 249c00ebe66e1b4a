"""Everyday conversations: short scripts about simple things, with slots and turns to choose from.

A script is a topic: a line of reasoning, then steps. Of each step one line is chosen, ``what the
user says | another wording => the reply | another reply``; ``[12]`` before it means that it goes
only with line 1 or 2 of the step before. A slot such as ``{dish}`` has one value in the whole
conversation, so that later turns come back to it. An indented line goes on with the line above.
"""

from __future__ import annotations

import re
from random import Random
from typing import NamedTuple

from .document import Document, Exchange, Split, conversation, held_out, talk_key
from .phrases import (
    ANIMALS,
    CAPITALS,
    CITIES,
    COLORS,
    DAYS,
    FOODS,
    JOBS,
    MONTHS,
    NAMES,
    OBJECTS,
    PLACES,
)

_LARGE = {"house", "tower", "bridge", "ship", "garden", "train", "tent", "boat"}
_SLOTS: dict[str, list[str]] = {
    "name": NAMES,
    "object": [o for o in OBJECTS if o not in _LARGE],
    "color": COLORS,
    "animal": ANIMALS,
    "fruit": [f for f in FOODS if f != "tomato"],
    "city": CITIES,
    "country": list(CAPITALS),
    "job": JOBS,
    "place": PLACES,
    "day": DAYS,
    "month": MONTHS,
    "pet": "dog cat rabbit bird mouse".split(),
    "petname": "Rex Max Luna Coco Lucky Bruno Molly Snowy".split(),
    "dish": "soup bread rice cheese cake fish pizza salad pasta chicken".split(),
    "drink": "water milk tea coffee juice".split(),
    "hobby": "reading swimming cooking drawing running singing dancing painting fishing".split(),
    "sport": "football tennis basketball chess volleyball golf".split(),
    "subject": "math history music art science English geography".split(),
    "kin": "cousin neighbor friend boss".split(),
    "person": "mother father brother sister uncle aunt grandmother grandfather".split(),
    "instrument": "piano guitar violin flute drums".split(),
    "weather": "sunny rainy cold warm windy cloudy".split(),
    "sad": "sad tired angry bored lonely nervous".split(),
    "glad": "happy glad excited proud".split(),
    "season": "spring summer autumn winter".split(),
    "number": "two three four five six seven eight nine ten".split(),
    "ill": "a cold|a headache|a fever|a cough|a sore throat".split("|"),
    "book": "a book about animals|a book about the sea|a love story|a funny story"
            "|a book about old times".split("|"),
}  # fmt: skip

_SCRIPTS = """
The user is not happy. I am kind and ask why.
I am {sad} today. | I feel {sad}. | I am so {sad}. => I am sorry to hear that. Why are you
  {sad}? | That is a pity. Why do you feel {sad}?
-
I lost my {object}. | I can not find my {object}. => I hope you find your {object} soon. Where
  did you see it last?
I did not sleep well. | I slept badly. => Then go to bed early tonight. Sleep helps a lot.
I had a hard day at work. | Work was hard today. => Now you can rest. You did your best today.
My {person} is ill. => I hope your {person} gets well soon.
I have a test on {day}. => Learn a little every day and you will do well on {day}.
I do not know. => That is all right. Sometimes we feel {sad} and do not know why.
-
Thank you. | Thanks, that helps. => You are welcome. I hope you feel better soon.
Can you help me? | What can I do? => Talk to a friend, go for a walk, and be kind to yourself.
Why did I feel bad? | How did I feel? => You said that you were {sad}.

The user is happy. I am happy with them and ask why.
I am {glad} today. | I feel {glad}. | I am so {glad}! => That is good to hear! Why are you
  {glad}? | How nice! What made you {glad}?
-
It is my birthday. | Today is my birthday. => Happy birthday! I wish you a wonderful day.
I found my {object}. => That is great! It is good that you have your {object} again.
I got a new {pet}. => How nice! What is the name of your {pet}?
My {person} comes to visit on {day}. => Then you will have a good time together on {day}.
I passed my test. => Well done! Your work was worth it.
-
Thank you. | Thanks! => You are welcome!
How did I feel today? | How do I feel? => You said that you are {glad}.

The user talks about the weather.
It is {weather} today. | The weather is {weather} today. | Today it is very {weather}. => Do you
  like it when it is {weather}? | I see. Do you like {weather} days?
-
Yes, I do. | Yes, very much. | Yes. => Then enjoy the day! What will you do?
No, I do not. | Not at all. | No. => Then stay at home and drink some {drink}. What will you do?
-
I will go to the {place}. | I want to go to the {place}. => That is a good idea. Have fun at the
  {place}!
I will stay at home and read. => That sounds nice. A good book is good company.
I do not know yet. => You could visit a friend or cook some {dish}.
-
What is the weather like? | How is the weather? => You said that it is {weather} today.

The user asks what to do when it rains.
It is raining. | It rains again. => Then take an umbrella when you go out.
It is snowing. | There is snow outside! => How nice! You can make a snowman.
It is very hot. | It is so hot today. => Drink a lot of water and stay out of the sun.
It is very cold. | It is so cold today. => Put on a warm coat and drink some hot tea.
-
Good idea. | I will do that. | Thank you. => Good. Have a nice day!
Do you feel the weather too? => No. I am a program, so I do not feel heat or cold.

The user talks about food.
I am hungry. | I want to eat something. => What do you like to eat? | What would you like to
  eat?
What should I eat today? | What can I eat for dinner? => You could have {dish}. Do you like
  {dish}?
-
[1] I like {dish}. | {Dish} would be nice. | I love {dish}. => Then have some {dish}. Enjoy your
  meal!
[2] Yes, I do. | Yes. => Then have some {dish}. Enjoy your meal!
[2] No, not really. | No. => Then try {dish2}.
[1] I do not know. => How about {dish} and a {fruit}?
-
Thank you. => You are welcome. Enjoy your meal!
Do you eat {dish}? | Do you like {dish}? => I am a program, so I do not eat. But many people
  like {dish}.
What should I drink? => How about some {drink}?

The user talks about cooking.
I want to cook {dish}. | I am cooking {dish}. | Today I cook {dish}. => That sounds good. For
  whom do you cook? | Nice! Who will eat with you?
-
For my {person}. | My {person}. => Your {person} will like it.
For my friends. | Some friends. => Your friends will like it. It is good to eat together.
Only for me. | Nobody, only me. => It is good to cook for yourself, too.
-
I have no {drink} at home. => Then you can buy some {drink} at the market.
What am I cooking? | What do I cook? => You are cooking {dish}.
Thank you. => You are welcome. Enjoy the {dish}!

The user likes a fruit.
I like {fruit}s. | My favorite fruit is the {fruit}. => {Fruit}s are sweet and healthy. Do you
  eat them often? | Good! Do you eat them often?
-
Yes, every day. | Yes. => That is healthy.
No, only on {day}. | No, not often. => That is better than never.
Yes, with some {drink}. => That is a good meal.
-
What fruit do I like? | Which fruit do I like? => You like {fruit}s.
Do you like {fruit}s? => I can not taste them, but I know that many people like {fruit}s.

The user talks about a pet.
I have a {pet}. | I have a {pet} at home. | We have a {pet}. => How nice! What is the name of
  your {pet}? | I like animals. What is your {pet} called?
-
Its name is {petname}. | It is called {petname}. | {petname}. => {petname} is a good name for a
  {pet}. How old is {petname}?
-
It is {number} years old. | {Number} years. | {Number}. => I see. What does {petname} like to
  do?
I do not know. => That does not matter. What does {petname} like to do?
-
It likes to sleep. | It sleeps a lot. => Many animals sleep a lot. {petname} has a good life.
It likes to play. | It plays with a ball. => Then play with {petname} every day.
It likes to eat. => Then give {petname} good food, but not too much.
-
What is the name of my {pet}? | What is my {pet} called? => Your {pet} is called {petname}.
What animal do I have? => You have a {pet}. Its name is {petname}.

The user asks about pets.
Should I get a {pet}? | I want to have a {pet}. | I would like a {pet}. => A {pet} needs time,
  food and love. Do you have time for a {pet}?
-
Yes, I do. | Yes. => Then a {pet} will be a good friend for you.
No, not much. | No. => Then it is better to wait.
-
What does a {pet} need? => A {pet} needs time, food and love.
Thank you. => You are welcome.

The user talks about a hobby.
I like {hobby}. | My hobby is {hobby}. | I love {hobby}. => {Hobby} is a nice hobby. How often
  do you do it? | That is a good hobby. When do you do it?
-
Every day. => Every day! Then you must be very good at it.
On {day}. | Every {day}. => So {day} is a good day for you.
Not often. | I do not have much time. => I hope you find more time for it soon.
-
With whom should I do it? => Ask a friend to come with you. It is more fun together.
What is my hobby? | What do I like? => Your hobby is {hobby}.
What is your hobby? | Do you have a hobby? => I like to talk with people and to answer
  questions.

The user talks about a sport.
I play {sport}. | I like to play {sport}. => {Sport} is a good game. With whom do you play? |
  Nice! Who plays {sport} with you?
-
With my {person}. | My {person}. => It is nice that you play with your {person}. Who wins?
With friends. | Some friends. => It is good to play with friends. Who wins?
-
I win. | I always win. => Well done! You must be very good.
They win. | I lose. | I always lose. => That does not matter. The game is fun anyway.
Sometimes I win, sometimes I lose. => That is a fair game.
-
Which game do I play? | What do I play? => You play {sport}.
Can you play {sport}? => No, I have no body. But I can talk about {sport}.

The user talks about music.
I like music. | I love music. => Music is wonderful. Do you play an instrument?
I play the {instrument}. | I am learning the {instrument}. => How nice! How long have you played
  the {instrument}?
-
[1] Yes, the {instrument}. | I play the {instrument}. => The {instrument} sounds beautiful.
  Practice a little every day.
[2] For {number} years. | {Number} years. => {Number} years is a long time. You must play well.
[1] No, I only listen. | No. => Listening is good, too.
-
Do you like music? => I can not hear, but I know many words about music.
Thank you. => You are welcome.

The user talks about a book.
I am reading {book}. | I read {book}. => That sounds interesting. Do you like it? | Nice! Is it
  good?
-
Yes, it is very good. | Yes, very much. | Yes. => Then enjoy the end of it. Who gave it to you?
No, it is boring. | Not really. | No. => Then read another one. There are many books. Who gave
  it to you?
-
My {person}. | My {person} gave it to me. => That is kind of your {person}.
I bought it. => It is good to buy books.
It is from the library. => A library is a good place for people who like to read.
-
What am I reading? => You are reading {book}.
Can you tell me a story? | Tell me a story. => Once there was a small {animal}. It lived near a
  {place}. One day it met a {animal2}, and they became friends.

The user wants a story.
Tell me a story. | Can you tell me a story? | Please tell me a short story. => Once there was a
  {animal} that lived near the {place}. One day it found a {color} {object}. It gave the
  {object} to a {animal2}, and they became friends.
Tell me a story about a {animal}. | A story about a {animal}, please. => Once there was a
  {animal}. It was alone and went to the {place}. There it met a {animal2}. Now they play every
  day.
-
Thank you. | That was nice. | I like it. => I am glad that you like it.
Who was in the story? | Which animals were in it? => There was a {animal} and a {animal2}.
Where did they meet? | Where was it? => It was at the {place}.
Another one, please. => Once a {animal2} had no friends. Then it helped a {animal}, and it was
  alone no more.

The user talks about somebody.
I have a {kin}. | Let me tell you about my {kin}. => Tell me about your {kin}. What is the name?
  | What is the name of your {kin}?
-
{name}. | The name is {name}. => {name} is a nice name. What does {name} do?
-
{name} is a {job}. | My {kin} is a {job}. => A {job} does important work. Where does {name}
  live?
{name} does not work any more. => Then {name} has time for other things. Where does {name} live?
-
In {city}. | {name} lives in {city}. => I have read about {city}. Do you visit {name} often?
Near me. | Near the {place}. => Then you can see {name} often.
-
What is the name of my {kin}? => Your {kin} is called {name}.
Who is {name}? => {name} is your {kin}.

The user talks about work.
I am a {job}. | I work as a {job}. => A {job} does important work. Do you like it? | That is a
  good job. Do you like to be a {job}?
-
Yes, I do. | Yes, very much. | Yes. => I am glad. It is good to like one's work.
No, it is hard. | Not really. | No. => I am sorry. What would you like to do?
-
I want to be a {job2}. | I would like to be a {job2}. => Then learn a lot. A {job2} has to know
  much.
I start early in the morning. => Then go to bed early.
I want a holiday. => A holiday is good for everyone. Where would you go?
-
What is my job? | What do I do? => You are a {job}.
What is your job? | What do you do? => I answer questions and talk with people.

The user talks about school.
I go to school. | I am at school. => What is your favorite subject? | Which subject do you like?
I have to learn for school. | I have homework. => What do you have to learn?
-
{Subject}. | It is {subject}. => {Subject} is interesting. Who is your teacher?
-
My teacher is {name}. | {name}. => I hope that {name} is a good teacher.
I do not like my teacher. => I am sorry. I hope you still like {subject}.
-
Which subject do I like? | What is my subject? => It is {subject}.
Can you help me with it? => I can add, subtract and answer simple questions. Just ask me.

The user talks about a trip.
I want to go to {city}. | I will travel to {city}. | I am going to {city}. => {city} is a great
  city. When will you go? | How nice! When do you go to {city}?
-
In {month}. | Next {month}. => {Month} is a good time. With whom will you travel?
On {day}. => That is soon! With whom will you travel?
I do not know yet. => That is all right. With whom will you travel?
-
With my {person}. | My {person} comes with me. => You two will have a good time.
Alone. | I go alone. => Then you can see what you like. Take care of yourself.
-
How should I go there? => You can go by train, by car or by plane.
Where do I go? | Where do I want to go? => You want to go to {city}.
What should I take with me? => Take warm clothes, some money and a good book.

The user asks where I have been.
Have you been to {city}? | Do you know {city}? => I am a program, so I do not travel. But I know
  that {city} is a big city.
Do you like {country}? | Have you been to {country}? => I have never been there. Would you like
  to go to {country}?
-
I live there. => Then you know it much better than I do. Is it nice there?
I would like to go there. | Yes, I would. => I hope you can go there soon.
No. => That is all right. There are many other places.
-
Yes, it is. | It is beautiful. => That is good to hear.
Where do you live? | Where are you? => I live in a computer.

The user talks about where they live.
I live in {city}. | I am from {city}. => {city} is a big city. Do you like it there? | Do you
  like to live in {city}?
-
Yes, I do. | Yes. => What do you like about {city}?
No, it is too loud. | No. => Where would you like to live?
-
I like the {place}. | The {place} is nice. => A {place} is a good place to be.
Near a {place}. | I want to live near a {place}. => That sounds quiet and nice.
My friends are there. => Friends make a place a home.
-
Where do I live? | Which city do I live in? => You live in {city}.

The user asks what I like.
What is your favorite color? | Which color do you like? => I can not see, but I like the word
  {color}. What is your favorite color?
What is your favorite animal? | Which animal do you like? => I like the {animal}. What is your
  favorite animal?
What is your favorite food? | What do you like to eat? => I do not eat. But people tell me that
  {dish} is good. What do you like?
-
[1] I like {color2}. | {Color2}. => {Color2} is a nice color.
[2] I like the {animal2}. | The {animal2}. => The {animal2} is a good animal.
[3] I like {dish2}. | {Dish2}. => I hope that you can eat {dish2} soon.

The user asks what I am.
Are you a robot? | Are you a machine? | Are you a computer? => I am a computer program. I am
  called v4-nano.
Are you alive? | Do you live? => No. I am a computer program, so I am not alive.
Do you have feelings? | Can you feel? => No, I have no feelings. But I like to be kind.
How old are you? | When were you born? => I am a program, so I have no age.
Do you have a body? | Do you have hands? => No, I am only a program. I have no body.
Do you sleep? | Are you tired? => No, I never sleep. I am always here when you need me.
Do you have friends? | Do you have a family? => No, but I like to talk with you.
Can you see me? | Can you hear me? => No, I can only read what you write.
Who made you? | Who trained you? => I was trained with the program dsv4.
Are you smart? | Do you know everything? => No, I am a very small model. I know only a few
  things.
Do you make mistakes? | Are you always right? => I make mistakes. Please check what I say.
-
I see. | Okay. | That is interesting. => Is there something I can do for you?
Do you like it? => I like to talk with you.
What can you do? => I can add and subtract, find facts in a text, write JSON and answer simple
  questions.

The user has plans for the day.
I will go to the {place} tomorrow. | Tomorrow I go to the {place}. => What will you do there? |
  That sounds nice. What will you do at the {place}?
-
I will meet {name}. | I meet {name} there. => Say hello to {name} from me.
I will take a walk. | I want to walk. => A walk is good for you.
I do not know yet. => You will find something to do.
-
Whom will I meet? | Where do I go? => You go to the {place} tomorrow.
Will it rain? => I do not know the weather of tomorrow. Take an umbrella with you.
Do you want to come? => I can not come with you, but I wish you a lot of fun.

The user wants to meet a friend.
I will meet {name} on {day}. | On {day} I meet {name}. => How nice! What will you do together? |
  What will you and {name} do on {day}?
-
We will play {sport}. | We want to play {sport}. => {Sport} is fun. I hope that you win.
We will eat {dish}. | We want to eat {dish}. => Enjoy the {dish}!
We will go to the {place}. => Have a good time at the {place}.
-
When do I meet {name}? | When will I meet {name}? => You meet {name} on {day}.
Whom do I meet on {day}? | Whom will I meet? => You meet {name} on {day}.

The user talks about a present.
{name} has a birthday on {day}. | On {day} is the birthday of {name}. => Do you have a present
  for {name}? | How nice! What will you give {name}?
-
No, not yet. | No. | I do not know. => What does {name} like?
A {object}. | I will give {name} a {object}. => A {object} is a good present.
-
{name} likes {hobby}. | {Hobby}. => Then give {name} a book about {hobby}.
{name} likes {color} things. => Then give {name} a {color} {object2}.
I think so, too. | Good. => I hope that {name} likes it.
-
Whose birthday is it? | Who has a birthday? => {name} has a birthday on {day}.
When is the birthday? => It is on {day}.

The user is ill.
I have {ill}. | I feel ill. I have {ill}. | I am ill. => I am sorry. Do you have to see a
  doctor? | I hope you get well soon. Did you see a doctor?
-
Yes, on {day}. | On {day}. => Good. The doctor will help you.
No, it is not so bad. | No. => Then rest and drink a lot of {drink}. If it gets worse, see a
  doctor.
-
Thank you. | Thanks. => You are welcome. Get well soon!
What should I do? | What helps? => Rest, drink a lot and keep warm.

The user goes shopping.
I need a new {object}. | I want to buy a {object}. => What color should it be? | Which color do
  you want?
-
{Color}. | It should be {color}. | I want a {color} one. => A {color} {object} is nice. You can
  look at the market.
I do not care. => Then take the one that costs least.
-
What do I want to buy? | What do I need? => You want to buy a {object}.
How much does it cost? => I do not know. Ask in the shop.
Thank you. => You are welcome!

The user learns something.
I am learning English. | I learn English. => That is good. Why do you learn it? | Your English
  is good. Why do you learn it?
I want to learn the {instrument}. => That is a good idea. Do you have a teacher?
-
[1] For my job. | I need it for my work. => That is a good reason.
[1] For a trip. | I want to travel. => Then you can talk to many people.
[2] No, I learn alone. | No. => Then take your time.
[2] Yes, {name} teaches me. => I hope that {name} is a good teacher.
-
It is hard. | It is not easy. => Do not give up. Everything is hard at first.
How can I get better? | How can I learn more? => Practice a little every day.

The user talks about a season.
I like {season}. | My favorite season is {season}. => Why do you like {season}? | What do you do
  in {season}?
-
I like the weather. | The weather is nice. => The weather is a good reason.
I can go to the {place}. | I go to the {place}. => The {place} is beautiful in {season}.
I have a holiday then. => A holiday is always good.
-
Which season do I like? | What is my favorite season? => You like {season}.
What season do you like? | Which season do you like? => I like them all. Every season has its
  beauty.

The user can not sleep.
I can not sleep. | I am still awake. => It is late. What keeps you awake? | Are you thinking
  about something?
-
I think about work. | I think about school. => Leave it for tomorrow. You can do it then.
It is too loud. | My neighbors are loud. => Close the window and listen to quiet music.
I do not know. | Nothing. => Read a little or drink some warm milk.
-
Thank you. Good night. | Good night. => Good night! Sleep well.
I will try. | I will do that. => Good. Sleep well!

The user wants a joke.
Tell me a joke. | Can you tell me a joke? | Make me laugh. => Why did the {animal} cross the
  road? To get to the other side.
Do you know a joke? => What has hands but can not clap? A clock.
Say something funny. => What gets wet while it dries? A towel.
-
That is funny. | Ha ha. | Good one. => I am glad that you like it.
I do not get it. | That is not funny. => I am sorry. I am not good at jokes.
Another one, please. | One more. => What has a neck but no head? A bottle.

The user greets me and asks how I am.
Hello, how are you? | Hi, how are you? | Hey, how is it going? | How are you doing? => I am fine,
  thank you. How are you? | I am well, thank you. And you?
What is up? | What is new? => Not much. I am here to talk with you. How are you?
-
I am fine, thanks. | I am good. | I am well, thank you. | Good, thanks. => I am glad to hear that.
  What would you like to talk about?
Not so good. | Not very well. | Not great. => I am sorry to hear that. What is wrong?
-
[1] I do not know. | Anything. => Then tell me something about your day.
[1] Let us talk about {hobby}. => Good. I like that topic. Do you like {hobby}?
[1] Tell me about {animal}s. => I like the {animal}. It is an animal that many people know.
[2] I am {sad}. | I feel {sad}. => That is hard. I hope that you feel better soon.
[2] I have {ill}. => Then rest well. I hope that you get well soon.
[2] I had a bad day. => I am sorry. Tomorrow is a new day.

The user is bored.
I am bored. | I have nothing to do. | What should I do today? | What can I do today? => You could go
  to the {place}, read a book or call a friend. | How about {hobby}? It is a nice hobby.
-
Good idea. | I like that. | I will do that. => Have fun!
I do not want to. | No, not today. | That is boring. => Then how about a walk to the {place}?
What else? | Another idea, please. => You could cook some {dish} or listen to music.
-
Thank you. | Thanks. => You are welcome.
Okay. | Maybe. => Have a nice day!

The user asks about my day.
How was your day? | Did you have a good day? => I am a program, so every day is the same. How was
  your day?
What did you do today? | What are you doing? => I answered questions and talked with people. What
  did you do?
-
It was good. | Good. | Very good. => I am glad. What was the best part?
It was bad. | Not good. | Not so good. => I am sorry. I hope that tomorrow is better.
I went to the {place}. | I was at the {place}. => How was it at the {place}?
I worked. | I worked all day. => Then you can rest now.
-
[1] I met {name}. | I saw {name}. => It is always good to see a friend.
[1] I had some {dish}. | The {dish} at dinner. => Good food makes a good day.
[2] I hope so, too. | Thank you. => You are welcome.
[3] It was nice. | Very nice. => I am glad that you had a good time.
[3] It was full of people. => Then come again on a quiet day.
[4] Yes, I am tired. | I will. => Sleep well!

The user asks what I think of an animal.
Do you like {animal}s? | What do you think about {animal}s? => Yes, I like all animals. Do you like
  {animal}s?
Which animal is better, the {animal} or the {animal2}? => Both are good animals. Which do you like
  better?
-
[1] Yes. | Yes, I do. | Yes, very much. => Then we agree.
[1] No. | No, I do not. | Not really. => That is all right. Which animal do you like?
[2] The {animal}. | I like the {animal}. => I see. The {animal} is a good choice.
[2] The {animal2}. | I like the {animal2}. => I see. The {animal2} is a good choice.
-
I like {animal2}s, too. | I like {animal2}s. => {Animal2}s are nice animals.
Thank you. | Okay. => You are welcome.

The user wants to hear something interesting.
Tell me something interesting. | Tell me a fact. | Do you know something interesting? => A spider
  has eight legs, but an insect has only six. | The sun is a star. It looks big because it is near.
  | A blue whale is the biggest animal in the world.
Say something. | Talk to me. | Tell me something. => I like to talk. What would you like to know?
-
[1] Interesting. | I did not know that. | Wow! => I am glad that you like it.
[1] I knew that. | That is old. => Then you know a lot!
[1] Another one, please. | One more. => Fish breathe with gills.
[2] I do not know. | Anything. => Then ask me what the capital of {country} is.
-
Thank you. | Thanks. => You are welcome!

The user is kind or not so kind to me.
You are nice. | I like you. | You are great. | Good job. | Well done. => Thank you! That is kind of
  you.
I love you. => Thank you. I am only a program, but I am glad that you like me.
You are stupid. | You are bad. | I do not like you. | You are wrong. => I am sorry. I am a small
  model and I make mistakes.
-
[12] Are you happy? => I am a program, so I have no feelings. But I like to help.
[3] That is all right. | Sorry. | No problem. => Thank you. What can I do for you?
[3] Why? | Why is that? => I am very small, and I know only a few things.
You are welcome. | Okay. => What can I do for you?

The user wants a poem or a song.
Write a poem. | Can you write a poem? | A short poem, please. => The sun is high, the sky is blue, I
  wish a happy day to you.
Sing a song. | Can you sing? => I have no voice, but here is a line: la la la, the day is bright and
  far.
-
That is nice. | I like it. | Beautiful. => I am glad that you like it.
Another one, please. | One more. => The moon is round, the night is deep, and all the little
  {animal}s sleep.

The user says goodbye.
I have to go. | I must go now. | I need to go. => It was nice to talk with you. See you soon!
I am going to bed. | I go to sleep now. | Good night. => Good night! Sleep well.
Goodbye. | Bye. | See you. | See you tomorrow. => Goodbye! Have a nice day.
-
Thank you for your help. | Thanks for the talk. | Thank you. => You are welcome. Come back soon!
You too. | Bye. | See you. => Goodbye!
"""


class Line(NamedTuple):
    """One turn: wordings and replies to choose from, and which lines it may follow (1, 2, ...)."""

    after: str
    said: list[str]
    replies: list[str]


def _parse() -> list[tuple[str, list[list[Line]]]]:
    """(line of reasoning, steps) of each script."""
    scripts = []
    for block in _SCRIPTS.strip().replace("\n  ", " ").split("\n\n"):
        why, rest = block.split("\n", 1)
        steps = []
        for step in rest.split("\n-\n"):
            lines = []
            for line in step.split("\n"):
                after, said, reply = re.findall(r"(?:\[(\d+)\] )?(.*) => (.*)", line)[0]
                lines.append(Line(after, said.split(" | "), reply.split(" | ")))
            steps.append(lines)
        scripts.append((why, steps))
    return scripts


SCRIPTS = _parse()
_PLURALS = {
    "mouses": "mice", "wolfs": "wolves", "sheeps": "sheep", "fishs": "fish", "foxs": "foxes",
    "cherrys": "cherries", "peachs": "peaches",
}  # fmt: skip
_PLURALS |= {one.capitalize(): many.capitalize() for one, many in _PLURALS.items()}
_WRONG = re.compile(rf"\b(?:{'|'.join(_PLURALS)})\b")
_SLOT = re.compile(r"{(\w+?)(2?)}")


def _fill(rng: Random, text: str, values: dict[str, str]) -> str:
    """The slots of a text; ``{dish2}`` differs from ``{dish}``, ``{Dish}`` has a capital."""

    def value(match: re.Match[str]) -> str:
        slot, second = match[1].lower(), match[2]
        while slot + second not in values:
            drawn = rng.choice(_SLOTS[slot])
            if drawn not in (values.get(slot), values.get(slot + "2")):
                values[slot + second] = drawn
        chosen = values[slot + second]
        return chosen[0].upper() + chosen[1:] if match[1][0].isupper() else chosen

    filled = _WRONG.sub(lambda match: _PLURALS[match[0]], _SLOT.sub(value, text))
    return re.sub(r"\b([Aa]) ([aeiou])", r"\1n \2", filled)


def everyday(
    rng: Random,
    split: Split = "train",
    *,
    thinking: bool | None = None,
    scripts: int | None = None,
    sure: bool = False,
) -> Document:
    """One or two everyday conversations of 2 to 5 turns; whole conversations are held out.

    With ``sure`` it ends where there is only one reply.
    """
    thinking = rng.random() < 0.15 if thinking is None else thinking
    while True:
        talk: list[Exchange] = []
        chosen = rng.sample(SCRIPTS, scripts or rng.choice((1, 1, 2)))
        for why, steps in chosen:
            values: dict[str, str] = {}
            before = ""
            for step in steps[: rng.randint(2, len(steps))]:
                number, line = rng.choice(
                    [(n, x) for n, x in enumerate(step, 1) if not x.after or before in x.after]
                )
                before = str(number)
                said, reply = rng.choice(line.said), rng.choice(line.replies)
                talk.append((_fill(rng, said, values), why, _fill(rng, reply, values)))
        if held_out(*talk_key(talk)) == (split == "heldout") and not (sure and line.replies[1:]):
            break
    return conversation(rng, "everyday", talk, thinking, 0.2)
