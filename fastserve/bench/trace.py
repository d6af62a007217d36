"""The demo's trace: bursts of short questions and long stories, the same on every machine.

Everybody asks at once, as people do: each burst brings many questions that a sentence answers and a few stories that
take a thousand words. A scheduler that cannot tell them apart makes the questions wait for the stories.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from ..types import SamplingParams

Kind = Literal["question", "story"]

# In iterations of a full batch, so that a fast machine has as many jobs to choose from as a slow one:
BURSTS = (0, 180, 360, 540, 720, 900, 1080, 1260)  # when a burst begins
BURST_LENGTH = 80  # its jobs arrive within this time, in shuffled order
QUESTION_TOKENS = 40  # most tokens of an answer
STORY_TOKENS = (150, 400)  # a story's limit is drawn from this range

QUESTIONS = (
    "What is the capital of France?",
    "How many legs does a spider have?",
    "What colour do you get when you mix blue and yellow?",
    "Which planet is closest to the Sun?",
    "What is the opposite of cold?",
    "Who wrote Romeo and Juliet?",
    "What is the largest ocean on Earth?",
    "How many days are there in a leap year?",
    "What do bees make?",
    "What is frozen water called?",
    "What is the tallest mountain in the world?",
    "How many continents are there?",
    "Which gas do plants take in from the air?",
    "What is the chemical symbol for gold?",
    "Which language is spoken in Brazil?",
    "What is the boiling point of water in Celsius?",
    "How many minutes are there in an hour?",
    "What is a baby dog called?",
    "Which animal is known as the king of the jungle?",
    "What is the name of our galaxy?",
    "What do caterpillars turn into?",
    "How many sides does a hexagon have?",
    "Which country gave the Statue of Liberty to the United States?",
    "What is the currency of Japan?",
    "What instrument has 88 keys?",
    "Which season comes after winter?",
    "What is the hardest natural material?",
    "What organ pumps blood through the body?",
    "How many strings does a violin have?",
    "What is the capital of Italy?",
    "What do we call a scientist who studies stars?",
    "Which planet is famous for its rings?",
    "What is the main ingredient of bread?",
    "How many players are on a football team?",
    "What is the largest animal in the world?",
    "Who painted the Mona Lisa?",
    "What is the smallest prime number?",
    "Which month has the fewest days?",
    "What is the capital of Egypt?",
    "What do cows drink?",
    "Which metal is liquid at room temperature?",
    "What is the square root of 81?",
    "How many hours are there in a day?",
    "Which bird cannot fly but swims very well?",
    "What is the capital of Canada?",
    "Which fruit keeps the doctor away?",
    "What is the fastest land animal?",
    "What is the longest river in Africa?",
    "What force keeps us on the ground?",
    "What is the first letter of the Greek alphabet?",
    "How many colours are there in a rainbow?",
    "What is the capital of Spain?",
    "Which vitamin do we get from sunlight?",
    "What is the study of plants called?",
    "What do you call a shape with three sides?",
    "Which star is at the centre of our solar system?",
    "How many teeth does an adult human have?",
    "Which desert is the largest hot desert?",
    "What is the capital of Germany?",
    "What is the freezing point of water in Fahrenheit?",
    "Which ocean lies between Europe and America?",
    "What is the process by which plants make food?",
    "Who was the first person to walk on the Moon?",
    "What is the capital of Greece?",
    "What is the capital of Australia?",
    "How many bones does an adult human have?",
    "What is the main language of Mexico?",
    "Which animal gives us wool?",
    "What do we use to tell the time?",
    "Who discovered gravity after watching an apple fall?",
    "What is the largest planet in our solar system?",
    "How many zeros are in one million?",
    "What is the capital of India?",
    "Which insect has beautiful wings and begins life as a caterpillar?",
    "What is the most spoken language in the world?",
    "Which country is shaped like a boot?",
    "What is the chemical formula of water?",
    "How many wheels does a tricycle have?",
    "Which direction does the Sun rise from?",
    "What is the capital of Russia?",
    "Who was the first president of the United States?",
    "Which gas do humans need to breathe?",
    "What is the plural of mouse?",
    "How many letters are in the English alphabet?",
    "What is the capital of China?",
    "Which tool is used to look at distant stars?",
    "What is the name of a young cat?",
    "Which sport is played at Wimbledon?",
    "What is ten times twelve?",
    "Which colour is made from red and white?",
    "What is the capital of Norway?",
    "Who invented the telephone?",
    "Which part of a plant grows under the ground?",
    "What is the largest continent?",
    "How many weeks are there in a year?",
    "Which fruit is used to make wine?",
    "What is the capital of Portugal?",
    "How many degrees are there in a right angle?",
    "Which animal has a very long trunk?",
    "What is the opposite of early?",
    "Who wrote the play Hamlet?",
    "What is the largest desert animal with humps called?",
    "Which planet is known as the red planet?",
    "What do we call water that falls from clouds?",
    "How many seconds are there in a minute?",
    "What is the capital of Poland?",
    "Which organ do we use to think?",
    "What is seven times eight?",
    "Which country is home to the kangaroo?",
    "What is the past tense of the verb go?",
    "Who painted The Starry Night?",
    "What is the capital of Kenya?",
    "Which metal do magnets attract?",
    "What is a group of wolves called?",
    "How many eyes does a cyclops have?",
    "What is the main language of Argentina?",
    "Which bird is a symbol of peace?",
    "What is half of fifty?",
    "What is the capital of Turkey?",
    "Which ship hit an iceberg in 1912?",
    "What do we call the centre of an atom?",
    "Which season is the hottest?",
    "What is the capital of Sweden?",
    "Who was the first man in space?",
    "How many sides does a triangle have?",
    "What is the most abundant gas in the air?",
    "Which animal lays the largest eggs?",
    "What is the study of the weather called?",
    "What is the capital of Argentina?",
    "Which number comes after ninety-nine?",
    "What do we call a frozen river of ice?",
    "Which vegetable makes people cry when they cut it?",
    "What is the Roman numeral for ten?",
    "Which ancient people built the pyramids of Giza?",
    "What is the capital of South Korea?",
    "How many planets orbit the Sun?",
    "Which sense do we use our ears for?",
    "What is the smallest country in the world?",
    "Who wrote The Adventures of Tom Sawyer?",
    "What is the opposite of victory?",
    "Which mammal can fly?",
    "What is the capital of Ireland?",
    "What is the longest bone in the human body?",
    "Which sea creature has eight arms?",
)

STORIES = (
    "a lighthouse keeper who befriends a storm",
    "a robot that learns to paint",
    "a girl who finds a door in an old oak tree",
    "two rival bakers in a village by the sea",
    "a dragon who is afraid of the dark",
    "a train that travels through the seasons",
    "a clockmaker who loses an hour",
    "an astronaut who hears music on the Moon",
    "a fox and a heron who share a river",
    "a library where the books whisper at night",
    "a boy who sails to the edge of the map",
    "a gardener who grows stars",
    "an old violin that remembers every song",
    "a detective cat in a rainy city",
    "a postman who delivers letters to the past",
    "the last snowman of spring",
    "a whale that carries an island on its back",
    "a king who gives away his crown",
    "twins who live on opposite sides of a mirror",
    "a mountain village without shadows",
    "a scientist who teaches a parrot to sing",
    "a lost balloon that crosses an ocean",
    "a blacksmith who forges a sword of ice",
    "a school for young clouds",
)


@dataclass(frozen=True, slots=True)
class TraceJob:
    """One job of a trace: when it arrives, in seconds from the start, and what it asks."""

    name: str
    kind: Kind
    arrival: float
    title: str  # the prompt in short
    messages: tuple[dict[str, str], ...]  # the conversation so far, before the chat template
    params: SamplingParams

    @property
    def prompt(self) -> str:
        """What the user asks."""
        return self.messages[-1]["content"]


def demo_trace(seed: int = 0, iteration_seconds: float = 0.0125) -> list[TraceJob]:
    """Every question and story once, dealt evenly to the bursts, in order of arrival.

    `iteration_seconds` is what an iteration of a full batch takes. The seed decides the order of the jobs, the limits
    of the stories and the seeds their words are drawn with: equal seeds give equal traces. Questions are answered
    greedily, stories are sampled.
    """
    draw = random.Random(seed)
    questions = draw.sample(QUESTIONS, len(QUESTIONS))
    stories = draw.sample(STORIES, len(STORIES))
    jobs: list[TraceJob] = []
    for burst, start in enumerate(BURSTS):
        asked: list[tuple[Kind, str]] = [("question", text) for text in questions[burst :: len(BURSTS)]]
        asked += [("story", text) for text in stories[burst :: len(BURSTS)]]
        draw.shuffle(asked)
        arrivals = sorted(iteration_seconds * (start + draw.uniform(0.0, BURST_LENGTH)) for _ in asked)
        for arrival, (kind, text) in zip(arrivals, asked, strict=True):
            jobs.append(_job(f"{kind}-{len(jobs):03d}", kind, round(arrival, 3), text, draw))
    return jobs


def _job(name: str, kind: Kind, arrival: float, text: str, draw: random.Random) -> TraceJob:
    if kind == "question":
        params = SamplingParams(temperature=0.0, max_tokens=QUESTION_TOKENS)
        return TraceJob(name, kind, arrival, text, _messages("Answer in one short sentence.", text), params)
    params = SamplingParams(
        temperature=0.8,
        top_p=0.95,
        max_tokens=draw.randint(*STORY_TOKENS),
        seed=draw.randrange(2**32),
    )
    messages = _messages("You tell long and vivid stories.", f"Tell me a story about {text}.")
    return TraceJob(name, kind, arrival, f"A story about {text}", messages, params)


def _messages(system: str, user: str) -> tuple[dict[str, str], ...]:
    return {"role": "system", "content": system}, {"role": "user", "content": user}
