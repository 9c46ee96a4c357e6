"""Paraphrases of the captions of the sound library, so that a text encoder trained on it generalises over wording.

    python -m examples.sound_library.captions [MANIFEST]

prints every caption of the manifest with all its variants, for proofreading.
"""

import argparse
import csv
from pathlib import Path


# Category -> phrases that fit each of its sounds, the plain phrase first.
CATEGORIES = {
    "airplane": "an airplane; a plane; an aircraft; an aeroplane",
    "alarm": "an alarm; alarm sounds",
    "applause": "applause; an applauding audience",
    "arrow": "an arrow; an arrow flying; a bow and arrow",
    "baby_cry": "a baby; a crying baby; a baby wailing",
    "bee": "bees; buzzing bees; a bee; a swarm of bees",
    "bell": "a bell; a bell sound",
    "bird": "a bird; bird sounds; a bird call",
    "birds_ambience": "birds; birdsong; singing birds; birds chirping; several birds; chirping birds",
    "boat": "a boat; a boat on water; a wooden boat",
    "bubbles": "bubbles; bubbling; a bubbling sound",
    "burp": "a burp; burping",
    "camera": "a camera; a camera click",
    "car": "a car; a vehicle; a motor vehicle; an engine; a car engine; a running engine",
    "car_horn": "a car horn; a honking car; a vehicle horn",
    "cat": "a cat; cat sounds",
    "chainsaw": "a chainsaw; a running chainsaw",
    "chicken": "a chicken; chickens; a hen",
    "coins": "coins; coin sounds",
    "cough": "a cough; coughing",
    "cow": "a cow; cattle; cattle lowing",
    "crash": "a crash; a crash of objects; crashing",
    "crow": "a crow; a crow call; a raven",
    "crowd": "a crowd; people talking; a crowd of people; chatter; several people talking; many people speaking",
    "digging": "digging; a shovel; a hoe",
    "dog": "a dog; a barking dog; dog barks",
    "door": "a door; door sounds; a door in a house",
    "drip": "a drip; dripping; dripping water",
    "drum": "a drum; drums; drumming; percussion",
    "duck": "a duck; duck sounds",
    "electricity": "electricity; an electric buzz; electrical crackling",
    "elephant": "an elephant; elephant sounds",
    "explosion": "an explosion; an explosive blast; a boom",
    "farm": "farm animals; animals on a farm; a farmyard",
    "fire": "fire; a fire; flames; a burning fire",
    "footsteps": "footsteps; steps; a person walking; someone walking",
    "frog": "frogs; a frog; frog sounds",
    "glass": "glass; breaking glass; shattering glass",
    "goose": "a goose; goose sounds",
    "gunshot": "a gunshot; a gun; gunfire; shooting",
    "hammering": "hammering; hammer blows; a hammer",
    "heartbeat": "a heartbeat; a heart; heart sounds",
    "helicopter": "a helicopter; an aircraft; helicopter rotors; a helicopter overhead",
    "horse": "a horse; horse sounds",
    "insects": "insects; crickets; insects chirping",
    "instrument": "a musical instrument; music",
    "laugh": "laughter; a laugh; laughing; human laughter; someone laughing; people laughing",
    "leaves": "leaves; rustling leaves; rustling",
    "lion": "a lion; a big cat",
    "machine": "a machine; a running machine; machinery; an engine running; a motor; a humming motor",
    "metal": "metal; metallic sounds; a metallic sound",
    "monkey": "monkeys; a monkey; monkey sounds",
    "mosquito": "a mosquito; a flying mosquito; a mosquito whining",
    "motorcycle": "a motorcycle; a motorbike; a motorcycle engine; a revving engine",
    "music": "music; a piece of music; instrumental music; a tune",
    "noise": "noise; a steady noise",
    "owl": "an owl; an owl call; an owl at night",
    "paper": "paper; paper sounds",
    "phone": "a telephone; a phone; a ringing phone",
    "pig": "a pig; pig sounds",
    "pop": "a pop; popping",
    "rain": "rain; rainfall; a rain shower; falling rain; rainy weather",
    "rattle": "a rattle; rattling; a rattling sound",
    "rocks": "rocks; stones; falling rocks",
    "rooster": "a rooster; a cock; a cockerel",
    "sawing": "sawing; a saw; sawing wood",
    "scream": "a scream; screaming; a human scream",
    "sea_lion": "a sea lion; a seal",
    "sheep": "a sheep; sheep; bleating sheep",
    "ship_horn": "a ship horn; a foghorn; a boat horn",
    "singing": "singing; chanting; voices singing",
    "siren": "a siren; a wailing siren; sirens",
    "slurp": "a slurp; slurping",
    "sneeze": "a sneeze; sneezing",
    "speech": "speech; a person speaking; someone speaking; a person talking; a voice",
    "splash": "a splash; splashing; splashes of water; water splashing",
    "steam": "steam; hissing; hissing steam",
    "thunder": "thunder; a thunderstorm; a storm with thunder; rolling thunder",
    "toilet": "a toilet; a flushing toilet; a toilet flush",
    "train": "a train; a railway; trains",
    "typing": "typing; keyboard typing; a keyboard",
    "water": "water; flowing water; running water",
    "waves": "waves; ocean waves; the sea; the ocean",
    "wind": "wind; the wind; blowing wind; a windy day",
    "wings": "wings; flapping wings; a bird flapping its wings",
    "wolf": "a wolf; a howling wolf; a wolf call",
    "wood": "wood; wooden sounds; a wooden sound",
    "wood_chopping": "chopping wood; wood chopping; an axe",
}

# For captions that their category's phrases do not fit.
OTHER_CATEGORIES = {
    "a woman speaking": "a woman; a woman talking; speech; a female voice",
    "a man speaking": "a man; a man talking; speech; a male voice",
    "a woman speaking in French": "a woman speaking; a woman; speech; speech in French; a female voice",
    "a woman speaking in Spanish": "a woman speaking; a woman; a woman talking; speech; speech in Spanish",
    "a woman speaking in Russian": "a woman speaking; a woman; a woman talking; speech; speech in Russian",
    "a man speaking in Italian": "a man speaking; a man; a man talking; speech; speech in Italian; a male voice",
    "a woman screaming": "a woman; a scream; screaming; a female scream",
    "a man groaning in pain": "a man; a groan; a man shouting; groaning",
    "a goat bleating": "a goat; goats; bleating; a bleating goat",
    "a heavy gate closing": "a gate; a door; a gate closing; a heavy door",
    "a heavy gate opening": "a gate; a door; a gate opening; a heavy door",
    "wind chimes": "chimes; wind chimes ringing; small bells",
    "flamingos calling": "birds; flamingos; bird calls; geese",
    "a car braking and skidding": "a car; tires; skidding tires; a vehicle",
    "a building collapsing": "a collapse; a crash; falling rubble",
    "people talking in a market": "people talking; a crowd; people; a market; voices",
    "a snowstorm blowing": "wind; a snowstorm; strong wind; blowing wind",
    "a river rushing": "water; a river; rushing water; a fast river",
    "a ringtone melody": "music; a ringtone; a phone melody; a melody",
    "a bus engine starting": "a bus; an engine; a motor vehicle",
    "a cash register": "a cash register; a till",
    "a coin inserted": "a coin; a coin sound",
    "a cowbell": "a cowbell; percussion",
    "a cymbal crash": "a cymbal; cymbals; percussion",
    "a door hinge creaking": "a creaking door; a door; creaking",
    "a flamethrower": "a flamethrower; a burst of fire; fire",
    "a fuse burning": "a fuse; a burning fuse; a lit fuse",
    "a guitar playing": "a guitar; guitar music; music",
    "a guitar strum": "a guitar; guitar strings; music",
    "a didgeridoo playing": "a didgeridoo; a wind instrument; music",
    "a string instrument playing": "a string instrument; strings; music",
    "a plucked string": "a plucked string; a string; a musical note",
    "a tambura playing": "a tambura; a string instrument; music",
    "a trumpet playing": "a trumpet; a brass instrument; music",
    "a furnace burning": "fire; a furnace; a burning furnace; flames",
    "a shaker": "a shaker; a rattle; percussion",
    "a truck starting and honking an air horn": "a truck; a lorry; a motor vehicle",
    "a truck starting and pulling away": "a truck; a lorry; a motor vehicle",
    "an axe chopping wood": "chopping wood; wood chopping; an axe",
    "an earthquake rumbling": "an earthquake; a rumble; rumbling",
    "city traffic": "traffic; cars; city noise; vehicles",
    "machine gun fire": "a machine gun; gunfire; shooting",
    "reloading a gun": "a gun; a weapon; a gun being handled",
    "a cart rolling on rails": "a cart on rails; a rail cart; wheels on rails",
    "a mine cart rolling on rails": "a mine cart; a cart on rails; wheels on rails",
    "steam hissing from a steam engine": "a steam engine; steam; hissing steam",
    "wheels turning": "wheels; turning wheels; machinery",
    "wood creaking": "creaking wood; creaking; wood",
    "a hawk screeching": "a bird; a hawk; a bird of prey; a bird call",
    "tropical birds calling": "birds; tropical birds; bird calls",
    "a crowd cheering": "a crowd; cheering; a cheering crowd; cheers",
    "a gong": "a gong; a large bell; a metallic ring",
    "a bubble popping": "a bubble; a pop; bubbles",
    "a tree falling down": "a tree; a falling tree; wood",
    "church bells ringing": "bells; church bells; bells of a church",
    "a knock on wood": "wood; knocking; a knock",
    "a water fountain": "water; a fountain; splashing water",
    "water steaming in a sauna": "water; steam; a sauna",
    "a railroad level crossing bell": "a bell; a warning bell; a crossing bell",
}

# Caption -> (phrases; clauses; phrases for several such sounds in turn). A phrase fits after "the sound of", a clause
# is a sentence. All are lower case, so that they can be joined.
VARIANTS = {
    # airplane
    "an airplane propeller": (
        "a propeller; a spinning propeller; a propeller plane; a propeller whirring",
        "a propeller spins; an airplane propeller is turning",
    ),
    "a small propeller plane engine starting": (
        "a propeller plane starting; a small airplane starting its engine; an airplane engine starting up",
        "a small plane starts its engine; an airplane engine starts",
    ),
    "a jet plane taking off": (
        "a jet taking off; an airplane taking off; a jet plane; a jet engine; a plane taking off",
        "a jet takes off; an airplane takes off; a plane is taking off",
    ),
    "a propeller airplane": (
        "a propeller plane; a propeller aircraft; an airplane with propellers; a plane flying",
        "a propeller plane flies by; an airplane is flying",
    ),
    "a small propeller plane": (
        "a small plane; a small airplane flying; a propeller airplane; a light aircraft; a plane flying",
        "a small plane flies by; an airplane is flying; a plane flies overhead",
    ),
    # alarm
    "an alarm": (
        "an alarm sounding; an alarm going off; a warning signal; a blaring alarm",
        "an alarm sounds; an alarm is going off",
    ),
    "an alarm clock beeping": (
        "an alarm clock; a beeping alarm clock; an alarm clock ringing; beeping; electronic beeps",
        "an alarm clock beeps; an alarm clock is going off",
    ),
    # applause
    "a large crowd applauding": (
        "a crowd applauding; people clapping; a crowd clapping; clapping; an audience clapping; a round of applause",
        "a crowd applauds; people are clapping; the audience claps; a large crowd is applauding",
    ),
    "a crowd cheering": (
        "people cheering; a large crowd cheering; cheering and applause; an audience cheering; fans cheering",
        "a crowd cheers; people are cheering; the audience cheers",
    ),
    # baby_cry
    "a baby crying": (
        "an infant crying; a baby's cry; an infant; a small child crying",
        "a baby cries; a baby is crying; an infant cries",
    ),
    # bee
    "bees buzzing": (
        "a bee buzzing; a swarm of bees buzzing; a beehive; insects buzzing; buzzing",
        "bees buzz; bees are buzzing; a bee buzzes; a swarm of bees is buzzing",
    ),
    # bell
    "a doorbell": (
        "a doorbell ringing; a ringing doorbell; a doorbell chime; a bell at the door",
        "a doorbell rings; the doorbell is ringing; someone rings the doorbell",
    ),
    "a railroad level crossing bell": (
        "a railroad crossing; a railway crossing bell; a level crossing bell ringing; a ringing bell",
        "a railroad crossing bell rings; a bell rings at a railway crossing",
    ),
    "a church bell tolling": (
        "a church bell; a church bell ringing; a tolling bell; a large bell tolling; a bell ringing",
        "a church bell tolls; a church bell rings; a bell is tolling",
    ),
    "a gong": (
        "a gong being struck; a gong ringing; the strike of a gong",
        "a gong is struck; a gong rings; someone strikes a gong",
    ),
    "a bell ringing": (
        "a ringing bell; a bell chiming; a chime; a small bell; the ringing of a bell",
        "a bell rings; a bell is ringing; a bell chimes",
        "bells; bells ringing; several bells",
    ),
    "church bells ringing": (
        "church bells; ringing church bells; bells ringing; bells of a church; bells tolling",
        "church bells ring; church bells are ringing; bells ring",
    ),
    "a ship bell ringing": (
        "a ship bell; a ship's bell; a bell ringing; a ringing bell on a ship",
        "a ship's bell rings; a bell rings on a ship",
    ),
    # bird
    "a hawk screeching": (
        "a screeching hawk; the cry of a hawk; an eagle; a bird screeching",
        "a hawk screeches; a bird of prey cries; a hawk is screeching",
    ),
    "tropical birds calling": (
        "birds calling; birds in a jungle; exotic birds; birds in the rainforest; tropical birds",
        "tropical birds call; birds call in the jungle; exotic birds are calling",
    ),
    "a bird chirping": (
        "a chirping bird; a bird singing; a small bird; a bird tweeting; a chirp",
        "a bird chirps; a bird is chirping; a small bird sings",
        "a bird chirping again and again; chirps",
    ),
    # birds_ambience
    "birds singing in nature on a sunny day": (
        "birds singing; birds in nature; birds singing outside; birds in a forest; a sunny day with birds; "
        "birds chirping in nature; the songs of birds",
        "birds sing; birds are singing; birds chirp on a sunny day; birds are chirping in the trees",
    ),
    "birds singing": (
        "birds in the trees; many birds; the songs of birds; birds singing outside; birds tweeting",
        "birds sing; birds are singing; birds chirp; birds are chirping",
    ),
    # bubbles
    "bubbling lava": (
        "lava bubbling; boiling lava; molten lava; lava; a volcano; thick bubbles",
        "lava bubbles; lava is bubbling; molten rock bubbles",
    ),
    "water boiling": (
        "boiling water; bubbling water; a pot of boiling water; water bubbling in a pot",
        "water boils; water is boiling; a pot of water is bubbling",
    ),
    "a bubble popping": (
        "a bubble; a popping bubble; a bubble bursting; a small pop",
        "a bubble pops; a bubble bursts",
        "bubbles popping; popping bubbles",
    ),
    "bubbles": (
        "water bubbles; air bubbles; bubbles in water; bubbling water; bubbles rising",
        "bubbles rise in the water; water bubbles; bubbles are rising",
    ),
    # burp
    "a burp": ("a person burping; a belch; someone burping; belching", "a person burps; someone burps; a man belches"),
    # camera
    "a camera shutter": (
        "a camera shutter click; a photo being taken; a camera clicking; the click of a camera",
        "a camera clicks; someone takes a photo; a camera shutter clicks",
        "a camera clicking; photos being taken",
    ),
    # car
    "a truck starting and pulling away": (
        "a truck starting; a truck driving off; a truck engine; a lorry pulling away; an engine starting",
        "a truck starts and drives off; a truck pulls away; an engine starts and a truck drives away",
    ),
    "a truck starting and honking an air horn": (
        "a truck honking; a truck horn; a truck with an air horn; a truck honking its horn; an engine and a horn",
        "a truck starts and honks; a truck honks its horn; a truck blows its air horn",
    ),
    "a bus engine starting": (
        "a bus starting; a bus starting its engine; a bus engine; an engine starting; a motor starting up",
        "a bus starts its engine; a bus is starting; an engine starts",
    ),
    "city traffic": (
        "traffic in a city; cars driving; a busy street; street traffic; road traffic; cars passing by",
        "cars drive through a city; traffic passes by; cars are driving by",
    ),
    "a car passing by": (
        "a car driving by; a passing car; a car driving past; a car on a road; a vehicle passing by",
        "a car passes by; a car drives by; a car is driving past",
    ),
    # car_horn
    "a car horn": (
        "a car honking; a car horn honking; a horn honking; the horn of a car; honking",
        "a car honks; a car horn sounds; a car is honking; a driver honks the horn",
        "a car honking several times; car horns; cars honking",
    ),
    # cat
    "a cat meowing": (
        "a meowing cat; a meow; a cat's meow; a kitten meowing; a cat crying",
        "a cat meows; a cat is meowing",
        "cats meowing; a cat meowing again and again",
    ),
    # chainsaw
    "a chainsaw": (
        "a chainsaw running; a chainsaw cutting; the motor of a chainsaw; a chainsaw buzzing; a saw with an engine",
        "a chainsaw runs; a chainsaw is running; someone uses a chainsaw",
    ),
    # chicken
    "a chicken clucking": (
        "a clucking chicken; a hen clucking; chickens clucking; clucking; poultry on a farm",
        "a chicken clucks; a chicken is clucking; a hen clucks",
    ),
    # coins
    "a coin inserted": (
        "a coin being inserted; a coin dropping into a slot; a coin falling into a machine; inserting a coin",
        "a coin is inserted; a coin drops into a slot; someone inserts a coin",
    ),
    "coins jingling": (
        "jingling coins; coins clinking; a handful of coins; coins in a pocket; money; loose change",
        "coins jingle; coins are jingling; coins clink together",
    ),
    "a cash register": (
        "a cash register ringing; a cash register opening; a ringing cash register; a till opening",
        "a cash register opens; a cash register rings",
    ),
    # cough
    "a person coughing": (
        "a coughing person; someone coughing; a person's cough; a man coughing; a sick person coughing",
        "a person coughs; someone coughs; somebody is coughing",
        "repeated coughing; someone coughing several times",
    ),
    # cow
    "a cow mooing": (
        "a mooing cow; a moo; a cow on a farm; a cow in a field; mooing",
        "a cow moos; a cow is mooing; a cow moos in a field",
        "cows mooing; a cow mooing several times",
    ),
    "cows mooing": (
        "cows; mooing cows; a herd of cows; cows on a farm; cows in a field; mooing",
        "cows moo; cows are mooing; cows moo in a field",
    ),
    # crash
    "a crash": (
        "something crashing; a collision; things breaking; a smash; an object crashing down",
        "something crashes; things crash down; something falls and breaks",
        "crashes; several crashes",
    ),
    # crow
    "a crow cawing": (
        "a cawing crow; a caw; crows cawing; a black bird cawing; a raven cawing",
        "a crow caws; a crow is cawing",
        "crows; several crows cawing",
    ),
    # crowd
    "people talking at a party": (
        "a party; guests talking; people at a party; a crowd at a party; many people talking",
        "people talk at a party; people are talking; guests are chatting",
    ),
    "people talking in a market square": (
        "a market; a market square; people at a market; a busy market; many people talking; a crowd at a market",
        "people talk in a market square; people are talking at a market; a crowd is talking",
    ),
    "people talking in a tavern": (
        "a tavern; people in a tavern; people in a bar; a busy tavern; many people talking; guests in a pub",
        "people talk in a tavern; people are talking in a bar; guests chat in a tavern",
    ),
    # dog
    "a dog barking": (
        "a dog bark; barking; barks of a dog; a dog outside; a dog in a yard",
        "a dog barks; a dog is barking; the dog barks",
        "a dog barking again and again; dogs barking; dogs",
    ),
    # door
    "a door opening": (
        "a door being opened; an opening door; a door that opens; the opening of a door; opening a door",
        "a door opens; someone opens a door; the door is opening",
        "doors opening; a door opening several times",
    ),
    "a door closing": (
        "a door being closed; a closing door; a door shutting; a door being shut; closing a door",
        "a door closes; someone closes a door; the door shuts; someone shuts a door",
        "doors closing; a door closing several times",
    ),
    "a door opening and closing": (
        "a door being opened and closed; opening and closing a door; a door moving; a door opening and shutting",
        "a door opens and closes; someone opens and closes a door; a door opens and shuts",
        "doors opening and closing; a door opening and closing again and again",
    ),
    "wood creaking": (
        "wooden boards creaking; a creaking board; old wood creaking; a wooden creak; timber creaking",
        "wood creaks; wood is creaking; an old board creaks",
    ),
    "a door hinge creaking": (
        "a creaking hinge; a squeaky door hinge; a squeaking hinge; a door squeaking; a rusty hinge",
        "a door hinge creaks; a hinge squeaks; a hinge is creaking",
    ),
    "a door creaking": (
        "a creaking door; a squeaky door; a door squeaking; an old door creaking open; a creaky door",
        "a door creaks; a door is creaking; an old door creaks; a door squeaks",
    ),
    # drip
    "a water drop": (
        "a drop of water; a falling water drop; water dripping; a droplet; a dripping tap",
        "a drop of water falls; water drips; water is dripping",
        "water drops; drops of water; drops falling",
    ),
    # drum
    "a cymbal crash": (
        "a crash cymbal; a cymbal being struck; a cymbal hit; cymbals crashing",
        "a cymbal crashes; a cymbal is struck; a drummer hits a cymbal",
    ),
    "a drum hit": (
        "a drum being hit; a drum beat; a struck drum; a single drum; a hit on a drum",
        "a drum is hit; someone hits a drum; a drummer plays",
        "drum beats; drum hits; a drum being played; drums beating",
    ),
    "a cowbell": (
        "a cowbell being struck; a cowbell ringing; a cowbell hit",
        "a cowbell rings; someone plays a cowbell; a cowbell is struck",
        "a cowbell playing; several strokes on a cowbell",
    ),
    "a tabla drum": (
        "a tabla; a tabla playing; an Indian drum; tabla drums; a hand drum; drums of India",
        "a tabla plays; someone plays a tabla; a hand drum is played",
        "tabla beats; a tabla being played; a tabla rhythm",
    ),
    # duck
    "a duck quacking": (
        "a quacking duck; a quack; ducks quacking; quacking; a duck on a pond",
        "a duck quacks; a duck is quacking",
        "ducks; several quacks",
    ),
    # electricity
    "electricity buzzing and crackling": (
        "crackling electricity; buzzing electricity; an electric arc; high voltage; sparks; electric sparks",
        "electricity buzzes and crackles; electricity is crackling; sparks fly",
    ),
    "electric sparks crackling": (
        "electric sparks; crackling sparks; a short circuit; sparks; sparks flying; electrical sparks",
        "electric sparks crackle; sparks crackle; sparks fly from a broken cable",
    ),
    # elephant
    "an elephant trumpeting": (
        "a trumpeting elephant; an elephant's trumpet; an elephant calling; elephants trumpeting; an elephant call",
        "an elephant trumpets; an elephant is trumpeting; an elephant calls",
    ),
    # explosion
    "an explosion": (
        "something exploding; a bomb exploding; a blast; a bomb; a detonation; a big explosion",
        "something explodes; a bomb explodes; a bomb goes off; there is an explosion",
        "explosions; several explosions; bombs exploding",
    ),
    "an earthquake rumbling": (
        "a rumbling earthquake; the rumble of an earthquake; the ground shaking; a deep rumble; a low rumble",
        "an earthquake rumbles; the earth rumbles; the ground shakes",
    ),
    # fire
    "a furnace burning": (
        "fire in a furnace; a burning stove; a fire burning in a furnace; a roaring furnace; a fire burning",
        "a furnace burns; a fire burns in a furnace; a furnace is burning",
    ),
    "a fire crackling": (
        "a crackling fire; fire crackling; a campfire; a fireplace; a fire burning; wood burning; crackling flames; "
        "a bonfire",
        "a fire crackles; a fire is crackling; a fire burns; fire burns and crackles; wood is burning",
    ),
    "a fuse burning": (
        "a fuse fizzing; a burning fuse; a lit fuse hissing; a hissing fuse; a sparkling fuse",
        "a fuse burns; a fuse is burning; a fuse fizzes",
    ),
    "a flamethrower": (
        "a flamethrower firing; a jet of flame; flames from a flamethrower; a stream of fire; roaring flames",
        "a flamethrower fires; someone uses a flamethrower; a jet of flame roars",
    ),
    # footsteps
    "footsteps on dirt": (
        "walking on dirt; someone walking on a dirt road; steps on dirt; footsteps on earth; footsteps on the ground",
        "someone walks on dirt; a person walks on a dirt path",
    ),
    "footsteps on grass": (
        "walking on grass; someone walking on grass; steps on grass; footsteps in the grass; walking on a lawn",
        "someone walks on grass; a person walks across the grass",
    ),
    "footsteps on gravel": (
        "walking on gravel; someone walking on gravel; crunching footsteps; steps on gravel; gravel crunching",
        "someone walks on gravel; a person walks on a gravel path; gravel crunches underfoot",
    ),
    "footsteps on a hard floor": (
        "walking on a hard floor; someone walking indoors; steps on a hard floor; footsteps on the floor",
        "someone walks on a hard floor; a person walks across the floor",
    ),
    "footsteps on metal": (
        "walking on metal; steps on metal; someone walking on a metal floor; footsteps on a metal floor",
        "someone walks on metal; a person walks on a metal floor",
    ),
    "footsteps on sand": (
        "walking on sand; someone walking on sand; steps in the sand; footsteps on a beach; footsteps in the sand",
        "someone walks on sand; a person walks on a beach",
    ),
    "footsteps on snow": (
        "walking on snow; someone walking in the snow; footsteps in the snow; steps in snow; crunching snow",
        "someone walks in the snow; a person walks through snow; snow crunches underfoot",
    ),
    "footsteps splashing in water": (
        "walking in water; someone walking through water; splashing footsteps; footsteps in water; wading; "
        "footsteps in puddles; steps in water",
        "someone walks through water; a person wades through water; someone steps into puddles",
    ),
    "footsteps": (
        "footsteps of a person; a person's footsteps; walking; someone's steps; steps of a person",
        "someone walks; a person is walking; someone is walking",
    ),
    "footsteps on carpet": (
        "walking on carpet; footsteps in a room; someone walking on a carpet; steps on a carpet; footsteps on a rug",
        "someone walks on a carpet; a person walks across a carpet",
    ),
    "footsteps on stone": (
        "walking on stone; someone walking on stone; steps on stone; footsteps on a stone floor; steps on pavement",
        "someone walks on stone; a person walks on a stone floor",
    ),
    "footsteps on tile": (
        "walking on tiles; someone walking on tiles; steps on tiles; footsteps on a tiled floor; footsteps indoors",
        "someone walks on tiles; a person walks on a tiled floor",
    ),
    "footsteps on wood": (
        "walking on wood; someone walking on a wooden floor; steps on wood; footsteps on a wooden floor",
        "someone walks on wood; a person walks on a wooden floor",
    ),
    # glass
    "glass breaking": (
        "glass shattering; a window breaking; a glass breaking; broken glass; a breaking window; glass smashing",
        "glass breaks; glass shatters; a window breaks; glass is breaking; a glass smashes",
    ),
    # goose
    "a goose honking": (
        "a honking goose; geese honking; a goose call; the honk of a goose",
        "a goose honks; a goose is honking",
        "geese; several honks of a goose",
    ),
    # gunshot
    "a gunshot": (
        "a shot; a gun firing; a gun being fired; a pistol shot; a rifle shot; a gun going off",
        "a gun fires; someone fires a gun; a shot is fired; a gun is fired",
        "gunshots; several gunshots; shots being fired",
    ),
    "machine gun fire": (
        "a machine gun firing; machine guns; a burst of gunfire; automatic gunfire; rapid gunfire; gunshots",
        "a machine gun fires; a machine gun is firing; someone fires a machine gun",
    ),
    "reloading a gun": (
        "a gun being reloaded; a gun reloading; loading a gun; a weapon being reloaded; a gun being cocked",
        "someone reloads a gun; a gun is reloaded; someone loads a weapon",
    ),
    # hammering
    "hammering in a smithy": (
        "a smithy; a blacksmith at work; a hammer on an anvil; a blacksmith hammering; metal being hammered",
        "a blacksmith hammers; someone hammers in a smithy",
    ),
    "a blacksmith hammering on an anvil": (
        "a blacksmith; a hammer on an anvil; an anvil; a blacksmith hammering; a hammer hitting metal",
        "a blacksmith hammers on an anvil; a hammer strikes an anvil; a blacksmith is hammering",
    ),
    "a stonecutter chiseling stone": (
        "chiseling stone; a chisel on stone; a stonecutter; a hammer and chisel; stone being chiseled",
        "a stonecutter chisels stone; someone chisels stone; someone works on stone with a chisel",
    ),
    # helicopter
    "a helicopter flying": (
        "a flying helicopter; a helicopter flying overhead; a helicopter passing; rotor blades; a chopper",
        "a helicopter flies; a helicopter is flying; a helicopter flies overhead",
    ),
    # horse
    "horse hooves walking": (
        "a horse walking; horse hooves; hooves; hoofbeats; a trotting horse; the clip-clop of hooves",
        "a horse walks; a horse is walking; horse hooves clop",
    ),
    "a horse neighing": (
        "a neighing horse; a horse whinnying; a neigh; a whinny; a horse's neigh",
        "a horse neighs; a horse is neighing; a horse whinnies",
    ),
    "a horse galloping": (
        "a galloping horse; galloping hooves; hoofbeats; horse hooves; a horse running; a gallop",
        "a horse gallops; a horse is galloping; a horse runs by",
    ),
    # insects
    "crickets and night insects in a forest": (
        "crickets at night; a forest at night; night insects; crickets chirping; insects at night; a summer night; "
        "night in a forest",
        "crickets chirp at night; insects chirp in a forest; crickets are chirping; insects sing at night",
    ),
    "crickets chirping": (
        "chirping crickets; a cricket; a cricket chirping; crickets in the grass; crickets at night; grasshoppers",
        "crickets chirp; crickets are chirping; a cricket chirps",
    ),
    # instrument
    "a didgeridoo playing": (
        "the drone of a didgeridoo; a didgeridoo being played; an Australian didgeridoo",
        "a didgeridoo plays; someone plays a didgeridoo",
    ),
    "a guitar strum": (
        "a strummed guitar; a guitar chord; a guitar being strummed; strumming a guitar; an acoustic guitar",
        "a guitar is strummed; someone strums a guitar; someone plays a chord on a guitar",
    ),
    "a string instrument playing": (
        "a string instrument being played; a plucked instrument; notes on a string instrument",
        "a string instrument plays; someone plays a string instrument",
    ),
    "a plucked string": (
        "a string being plucked; plucking a string; a pluck; a string instrument",
        "a string is plucked; someone plucks a string",
        "plucked strings; strings being plucked",
    ),
    "a tambura playing": (
        "a tambura being played; a tanpura; an Indian string instrument; the drone of a tambura",
        "a tambura plays; someone plays a tambura",
    ),
    "a trumpet playing": (
        "a trumpet being played; a trumpet melody; a trumpet call; a trumpeter; a horn playing",
        "a trumpet plays; someone plays a trumpet; a trumpet is playing",
    ),
    "a guitar playing": (
        "a guitar being played; an electric guitar; playing the guitar; a guitar melody; guitar chords; a guitarist",
        "a guitar plays; someone plays a guitar; a guitarist plays",
    ),
    # laugh
    "a person laughing": (
        "someone laughing; a laughing person; people laughing; a man laughing; a chuckle; a giggle",
        "a person laughs; someone laughs; someone is laughing; a person is laughing",
    ),
    # lion
    "a lion growling": (
        "a growling lion; a lion roaring; a lion's growl; a roar; a growl; a roaring lion",
        "a lion growls; a lion roars; a lion is growling",
    ),
    # machine
    "machinery running": (
        "running machinery; machines running; an engine room; machines at work; the hum of machines",
        "machinery runs; machines are running; a machine is running",
    ),
    "an elevator motor": (
        "an elevator; an elevator running; a lift; a moving elevator; an electric motor; a motor humming",
        "an elevator moves; an elevator is running; a motor hums",
    ),
    "a fan humming": (
        "a fan; a humming fan; a ventilator; an electric fan; a fan running; the hum of a fan",
        "a fan hums; a fan is running; a fan is humming",
    ),
    "a steam engine": (
        "a steam engine running; a steam machine; an old steam engine; the pistons of a steam engine",
        "a steam engine runs; a steam engine is running",
    ),
    "wheels turning": (
        "wheels rotating; gears turning; rolling wheels; spinning wheels; a wheel turning",
        "wheels turn; wheels are turning; gears turn",
    ),
    "mining machinery running": (
        "mining machinery; a mine; machines in a mine; a mining machine; heavy machinery",
        "mining machinery runs; machines run in a mine; heavy machinery is running",
    ),
    "a jackhammer": (
        "a jackhammer pounding; a pneumatic drill; a running jackhammer; drilling in the street; a drill; "
        "construction work",
        "a jackhammer pounds; a jackhammer is running; someone uses a jackhammer",
    ),
    "factory machinery": (
        "a factory; machines in a factory; an industrial machine; machines running; a machine running; "
        "industrial noise",
        "machines run in a factory; factory machines are running; a machine is running",
    ),
    "a sewing machine": (
        "a sewing machine running; sewing; a sewing machine stitching; a running sewing machine",
        "a sewing machine runs; a sewing machine is running; someone sews with a machine",
    ),
    "a wind turbine turning": (
        "a wind turbine; a turning wind turbine; a turbine; the blades of a wind turbine; a rotating turbine",
        "a wind turbine turns; a turbine is turning",
    ),
    "a windmill turning": (
        "a windmill; a turning windmill; an old windmill; the sails of a windmill; a creaking windmill",
        "a windmill turns; a windmill is turning",
    ),
    # metal
    "a metal hit": (
        "metal being hit; a hit on metal; metal striking metal; a struck piece of metal; a clink of metal",
        "metal is hit; something hits metal; metal strikes metal",
        "metal hits; blows on metal",
    ),
    "a metal clang": (
        "a clang; clanging metal; a metallic clang; metal clanging; metal hitting metal; a clank",
        "metal clangs; metal hits metal; a piece of metal clangs",
        "clangs of metal; metal clanging again and again",
    ),
    "a metal chain rattling": (
        "a rattling chain; a chain; chains; a chain rattling; chains rattling; the clinking of a chain",
        "a chain rattles; a metal chain rattles; chains are rattling",
    ),
    "a metal clatter of a breakdown": (
        "a machine breaking down; a breakdown; a metallic clatter; clattering metal; metal clattering",
        "a machine breaks down; metal clatters; an engine breaks down with a clatter",
    ),
    "metal clattering": (
        "clattering metal; a metallic clatter; metal falling; metal objects falling; a clatter; metal breaking",
        "metal clatters; metal falls to the floor; metal is clattering",
    ),
    # monkey
    "monkeys screeching": (
        "screeching monkeys; a monkey screeching; monkeys in the jungle; apes; chattering monkeys",
        "monkeys screech; a monkey screeches; monkeys are screeching",
    ),
    # mosquito
    "a mosquito buzzing": (
        "a buzzing mosquito; mosquitoes; a mosquito flying; an insect buzzing; a fly buzzing; buzzing",
        "a mosquito buzzes; a mosquito is buzzing; a mosquito flies around",
    ),
    # motorcycle
    "a motorcycle passing by": (
        "a passing motorcycle; a motorbike passing by; a motorcycle driving by; a motorcycle on a road",
        "a motorcycle passes by; a motorbike drives by; a motorcycle is passing by",
    ),
    # noise
    "vinyl record hiss": (
        "the hiss of a vinyl record; a hissing record; vinyl noise; an old record; a crackling record; hiss",
        "a vinyl record hisses; an old record hisses",
    ),
    "television static noise": (
        "television static; static; static noise; white noise; radio static; hissing static",
        "a television shows static; there is static on the television",
    ),
    # owl
    "an owl hooting": (
        "a hooting owl; a hoot; the hoot of an owl; owls hooting; hooting",
        "an owl hoots; an owl is hooting; an owl hoots at night",
        "owls; an owl hooting several times",
    ),
    # paper
    "paper crumpling": (
        "crumpling paper; paper being crumpled; rustling paper; paper rustling; a sheet of paper",
        "paper is crumpled; someone crumples paper; paper rustles",
    ),
    # pig
    "a pig oinking": (
        "an oinking pig; an oink; a grunting pig; a pig grunting; a pig on a farm; pigs",
        "a pig oinks; a pig grunts; a pig is oinking",
    ),
    # pop
    "a balloon popping": (
        "a popping balloon; a balloon bursting; a balloon; a bursting balloon; a bang",
        "a balloon pops; a balloon bursts",
        "balloons popping; several balloons bursting",
    ),
    # rain
    "heavy rain falling": (
        "heavy rain; pouring rain; a downpour; heavy rainfall; rain pouring down; a rainstorm; strong rain; "
        "rain falling heavily; torrential rain",
        "it is raining heavily; it is raining; rain pours down; heavy rain falls; it rains hard; it is pouring",
    ),
    "rain falling": (
        "raindrops; steady rain; rain outside; raining; drops of rain; raindrops falling; rain on the ground",
        "it is raining; rain falls; rain is falling; it rains; raindrops fall",
    ),
    # rattle
    "a rattle": (
        "a rattle shaking; a baby rattle; a shaken rattle; something rattling",
        "something rattles; someone shakes a rattle; a rattle is shaken",
    ),
    "a shaker": (
        "a shaker being shaken; shaking; a percussion shaker; maracas; a shaker rhythm",
        "someone shakes a shaker; a shaker is shaken; someone plays a shaker",
    ),
    # rocks
    "rocks falling": (
        "stones falling; a rockfall; a rockslide; rocks tumbling; tumbling stones; rocks hitting the ground",
        "rocks fall; rocks are falling; stones fall to the ground; rocks tumble down",
    ),
    # rooster
    "a rooster crowing": (
        "a crowing rooster; a rooster's crow; a cock crowing; a cockcrow; a rooster in the morning",
        "a rooster crows; a rooster is crowing; a cock crows",
    ),
    # sawing
    "a saw cutting wood": (
        "a hand saw; wood being sawn; a saw sawing; sawing a board; cutting wood with a saw",
        "a saw cuts wood; someone saws wood; someone is sawing",
    ),
    "a circular saw cutting wood": (
        "a circular saw; a power saw; an electric saw; wood being sawn; a saw cutting wood; a sawmill",
        "a circular saw cuts wood; someone cuts wood with a power saw; a circular saw is running",
    ),
    # scream
    "a person screaming": (
        "someone screaming; a screaming person; a person yelling; a shout; a cry of pain; people screaming",
        "a person screams; someone screams; somebody is screaming; someone yells",
        "screams; several screams",
    ),
    # sea_lion
    "a sea lion barking": (
        "a barking sea lion; sea lions; sea lions barking; a seal barking; barks of a sea lion",
        "a sea lion barks; a sea lion is barking; a seal barks",
    ),
    # sheep
    "a sheep bleating": (
        "a bleating sheep; a lamb bleating; a bleat; the bleat of a sheep; a sheep on a farm; bleating",
        "a sheep bleats; a sheep is bleating; a lamb bleats",
        "several sheep; sheep bleating",
    ),
    "sheep bleating in a field": (
        "sheep in a field; sheep bleating; a flock of sheep; bleating sheep in a field; lambs bleating; bleating",
        "sheep bleat in a field; sheep are bleating; sheep bleat; a flock of sheep bleats",
    ),
    # ship_horn
    "a ship horn": (
        "a ship's horn; a ship horn blowing; the horn of a ship; a ship blowing its horn; a boat",
        "a ship blows its horn; a ship horn sounds; a foghorn sounds",
    ),
    "a ferry horn in a harbour": (
        "a ferry; a ferry horn; a ferry blowing its horn; a horn in a harbour; a ship's horn; a harbour",
        "a ferry blows its horn; a ferry horn sounds in a harbour; a ship's horn sounds",
    ),
    # siren
    "an emergency siren": (
        "an emergency siren wailing; an ambulance siren; a police siren; a fire engine siren; an emergency vehicle",
        "a siren wails; an emergency siren sounds; a siren is wailing; an ambulance passes with its siren on",
    ),
    # slurp
    "a slurp": (
        "someone slurping; a person slurping a drink; a noisy slurp; drinking through a straw",
        "someone slurps; a person slurps a drink",
    ),
    # sneeze
    "a person sneezing": (
        "someone sneezing; a sneezing person; a person's sneeze; achoo; a person with a cold sneezing",
        "a person sneezes; someone sneezes; somebody is sneezing",
        "sneezes; someone sneezing several times",
    ),
    # splash
    "splashing water": (
        "water; a splash of water; someone swimming; splashes; splashing in water; swimming",
        "water splashes; water is splashing; someone splashes in the water",
    ),
    "a splash into water": (
        "something falling into water; a splash in water; a water splash; a dive into water; a plunge",
        "something splashes into water; something falls into the water; water splashes",
        "splashes into water; things falling into water",
    ),
    # steam
    "a hiss of steam": (
        "a steam hiss; steam hissing; escaping steam; a sizzle; steam escaping; a burst of steam",
        "steam hisses; steam escapes; steam is hissing",
    ),
    "sizzling steam": (
        "steam sizzling; sizzling; something sizzling; water sizzling; a sizzle; frying; steam hissing",
        "steam sizzles; something sizzles; water sizzles on a hot surface",
    ),
    # thunder
    "thunder": (
        "a thunderclap; a clap of thunder; a crack of thunder; thunder crashing; lightning and thunder; "
        "lightning striking",
        "thunder rolls; it thunders; it is thundering; thunder crashes; lightning strikes",
        "thunderclaps; claps of thunder",
    ),
    "thunder rumbling": (
        "rumbling thunder; a rumble of thunder; distant thunder; thunder rolling; a storm; rolls of thunder",
        "thunder rumbles; thunder is rumbling; thunder rolls; it is thundering",
    ),
    # toilet
    "a toilet flushing": (
        "a flushing toilet; flushing a toilet; a toilet being flushed; the flush of a toilet; water in a toilet",
        "a toilet flushes; someone flushes the toilet; a toilet is flushed",
    ),
    # train
    "a mine cart rolling on rails": (
        "a rolling mine cart; a mine cart rolling; a cart rolling on rails; a wagon on rails; a rail car",
        "a mine cart rolls on rails; a mine cart rolls by; a cart is rolling on rails",
    ),
    "a cart rolling on rails": (
        "a rolling cart; a cart rolling; a wagon on rails; a mine cart; a rail car; a wagon rolling on a track",
        "a cart rolls on rails; a cart is rolling on rails; a wagon rolls along a track",
    ),
    "a steam train whistle as the train departs": (
        "a steam train; a steam train departing; a train whistle; a steam train whistling; a departing train; "
        "a locomotive whistle",
        "a steam train departs with a whistle; a steam train whistles and departs; a train departs",
    ),
    "a steam locomotive whistle": (
        "a train whistle; a steam whistle; a locomotive; a steam train whistling; the whistle of a steam locomotive",
        "a steam locomotive whistles; a train whistle blows; a steam train whistles",
    ),
    "a diesel train horn": (
        "a train horn; a train blowing its horn; a diesel train; the horn of a train; a locomotive horn",
        "a train blows its horn; a train horn sounds; a diesel train sounds its horn",
    ),
    "steam hissing from a steam engine": (
        "a hissing steam engine; a steam engine hissing; steam from a locomotive; a steam locomotive; escaping steam",
        "steam hisses from an engine; a steam engine hisses; a locomotive lets off steam",
    ),
    "a metro train departing": (
        "a metro; a subway train; a subway; a metro train; a departing train; an underground train; a train departing",
        "a metro train departs; a subway train leaves the station; a train departs",
    ),
    "a train passing by": (
        "a passing train; a train going by; a train on the tracks; a train rolling by; railway noise",
        "a train passes by; a train goes by; a train is passing",
    ),
    # typing
    "typing on a keyboard": (
        "someone typing; a computer keyboard; keys being pressed; a person typing; keyboard clicks",
        "someone types on a keyboard; a person is typing; someone types",
    ),
    # water
    "water flowing in a stream": (
        "a stream; a flowing stream; a babbling brook; a river; a creek; water in a river; a brook; water flowing",
        "water flows in a stream; a stream flows; water is flowing; a river flows; water runs in a brook",
    ),
    "a shower running": (
        "a shower; a running shower; water from a shower; a bathroom shower; someone showering",
        "a shower runs; a shower is running; someone takes a shower",
    ),
    "a faucet running": (
        "a faucet; a running faucet; a tap running; water from a tap; tap water; water running into a sink",
        "a faucet runs; water runs from a tap; a tap is running",
    ),
    "a waterfall": (
        "a waterfall roaring; water falling; falling water; rushing water; the roar of a waterfall; cascading water",
        "a waterfall roars; water falls; water is rushing down",
    ),
    "water running": (
        "water being poured; water from a tap; a tap; water flowing; pouring water",
        "water runs; water is running; water flows from a tap",
    ),
    "water steaming in a sauna": (
        "water on hot stones; steaming water; hissing steam in a sauna; water hissing on hot stones; steam in a sauna",
        "water steams in a sauna; water hisses on hot stones; someone pours water on the stones of a sauna",
    ),
    "a water fountain": (
        "a fountain splashing; water in a fountain; a fountain in a garden; a splashing fountain; flowing water",
        "a fountain splashes; water splashes in a fountain; a fountain is flowing",
    ),
    # wind
    "wind in the desert": (
        "desert wind; a desert; wind blowing in the desert; wind over sand; wind blowing; a windy desert",
        "wind blows in the desert; the wind blows over the desert; the wind is blowing; it is windy",
    ),
    "wind in the desert at night": (
        "a desert at night; desert wind at night; night wind; wind at night; wind blowing; wind in a desert",
        "wind blows in the desert at night; the wind blows at night; the wind is blowing; it is windy",
    ),
    "cold winter wind blowing": (
        "winter wind; cold wind; a cold wind blowing; wind in winter; a snowstorm; a blizzard; wind blowing",
        "a cold wind blows; the wind is blowing; the winter wind blows; it is windy; the wind blows hard",
    ),
    "wind blowing": (
        "strong wind; howling wind; a gust of wind; wind howling; a breeze; gusts of wind; wind outside",
        "the wind blows; wind is blowing; the wind is blowing; it is windy; the wind howls",
    ),
    "cold arctic wind blowing": (
        "arctic wind; cold wind; icy wind; a cold wind blowing; wind in the Arctic; a blizzard; wind blowing",
        "a cold arctic wind blows; an icy wind blows; the wind is blowing; it is windy; the wind howls",
    ),
    # wings
    "wings flapping": (
        "a bird flying off; a bat flapping its wings; fluttering wings; the flap of wings; wings beating; fluttering",
        "wings flap; a bird flaps its wings; wings are flapping; a bird flies off",
    ),
    # wolf
    "a wolf howling": (
        "a howl; wolves howling; howling; a wolf's howl; a wolf at night; wolves",
        "a wolf howls; a wolf is howling; a wolf howls at night",
    ),
    # wood
    "a knock on wood": (
        "knocking on wood; wood being knocked; a hit on wood; a wooden knock; knocking on a wooden board",
        "someone knocks on wood; something hits wood; wood is struck",
        "knocks on wood; several knocks on wood",
    ),
    "a tree falling down": (
        "a falling tree; a tree falling; a tree being felled; a tree crashing down; timber falling",
        "a tree falls; a tree falls down; a tree crashes to the ground",
    ),
    "wood breaking": (
        "breaking wood; wood cracking; wood splintering; a breaking plank; a board snapping; splintering wood",
        "wood breaks; wood splinters; a plank breaks; wood is breaking",
    ),
    # wood_chopping
    "an axe chopping wood": (
        "an axe hitting wood; a person chopping wood; wood being chopped; an axe blow; splitting wood",
        "an axe chops wood; someone chops wood; a woodcutter chops wood; someone splits logs with an axe",
        "axe blows; an axe chopping again and again",
    ),
    "a woman speaking": (
        "a woman talking; a woman's voice; a female voice speaking; an adult female speaking; a female speaking",
        "a woman speaks; a woman talks; a woman is speaking; a female speaks; an adult female speaks",
    ),
    "a man speaking": (
        "a man talking; a man's voice; a male voice speaking; an adult male speaking; a male speaking; a guy talking",
        "a man speaks; a man talks; a man is speaking; a male speaks; an adult male speaks; a man is talking",
    ),
    "a woman speaking in French": (
        "a woman talking; a woman's voice; a female voice speaking; an adult female speaking",
        "a woman speaks; a woman talks; a woman is speaking; a female speaks; a woman speaks in French",
    ),
    "a woman speaking in Spanish": (
        "a woman talking; a woman's voice; a female voice speaking; an adult female speaking",
        "a woman speaks; a woman talks; a woman is speaking; a female speaks; a woman speaks in Spanish",
    ),
    "a woman speaking in Russian": (
        "a woman talking; a woman's voice; a female voice speaking; an adult female speaking",
        "a woman speaks; a woman talks; a woman is speaking; a female speaks; a woman speaks in Russian",
    ),
    "a man speaking in Italian": (
        "a man talking; a man's voice; a male voice speaking; an adult male speaking; a man talking in Italian",
        "a man speaks; a man talks; a man is speaking; a male speaks; a man speaks in Italian; a man is talking",
    ),
    "music": (
        "music playing; background music; a song playing; orchestral music; instruments playing; slow music",
        "music plays; music is playing; a song plays; instruments play; someone plays music",
    ),
    "a ringtone melody": (
        "music playing; a ringtone playing; a tune playing; a short melody; a cell phone ringtone",
        "music plays; a ringtone plays; a melody plays; a phone plays a melody",
    ),
    "people chanting": (
        "people singing; a choir; a chant; voices chanting; a group singing",
        "people chant; a group sings; people sing; a choir sings",
    ),
    "people talking in a market": (
        "a crowd talking; many people talking; people speaking; chatter of a crowd; a busy market; people murmuring",
        "people talk; many people are talking; a crowd talks; people speak; people are talking in the background",
    ),
    "a woman screaming": (
        "a woman yelling; a female screaming; a woman's scream; a person screaming; a cry of pain",
        "a woman screams; a woman yells; a female cries out; someone screams",
    ),
    "a man groaning in pain": (
        "a man yelling; a male screaming; a man grunting; a man's cry; a cry of pain; a person groaning",
        "a man groans; a man yells; a man grunts; a man cries out; someone shouts",
    ),
    "ocean waves": (
        "waves crashing; waves on a beach; the surf; sea waves; waves breaking on the shore; the sea at a beach",
        "waves crash; ocean waves roll in; waves break on the shore; waves crash against a shoreline",
    ),
    "a wooden boat on water": (
        "a boat creaking; a rowboat; water lapping at a boat; a boat moving through water; a ship creaking",
        "a boat creaks on the water; water laps at a boat; a boat moves through water; a wooden ship creaks",
    ),
    "farm animals": (
        "chickens and sheep; animals in a farmyard; a farm; a barnyard; chickens on a farm; livestock",
        "farm animals call; chickens cluck on a farm; animals make noise on a farm",
    ),
    "leaves rustling": (
        "rustling leaves; leaves being moved; a bush rustling; dry leaves; plants rustling",
        "leaves rustle; something rustles in the leaves; someone rustles through leaves",
    ),
    "wind rustling leaves": (
        "wind in the trees; leaves rustling in the wind; trees in the wind; wind blowing through leaves",
        "wind blows through the leaves; leaves rustle in the wind; the wind rustles the trees",
    ),
    "digging in the ground": (
        "digging in soil; someone digging; a shovel digging; a hoe in the soil; digging earth",
        "someone digs; a person digs in the ground; a shovel digs into the earth",
    ),
    "a building collapsing": (
        "a collapsing building; rubble falling; a wall collapsing; debris falling; a large crash",
        "a building collapses; a wall falls down; debris falls; something collapses",
    ),
    "an arrow being shot": (
        "a bow being shot; an arrow whooshing; a whoosh; an archer shooting; an arrow flying by",
        "an arrow is shot; someone shoots an arrow; an arrow flies by; something whooshes",
    ),
    "swords clashing": (
        "metal clanging; clashing swords; a sword fight; swords hitting; metal hitting metal; clanking metal",
        "swords clash; metal clangs; metal hits metal; a sword hits a shield",
    ),
    "a pickaxe striking stone": (
        "a pickaxe; mining; someone mining; a pick hitting rock; stone being hit; chipping stone",
        "a pickaxe strikes stone; someone mines; a pick hits the rock; someone chips at stone",
    ),
    "hammering": (
        "a hammer hammering; someone hammering; hammer blows on wood; construction; pounding with a hammer",
        "someone hammers; a hammer hits wood; a person is hammering; a worker hammers",
    ),
    "dogs barking": (
        "barking dogs; several dogs barking; two dogs barking; dogs; barking",
        "dogs bark; dogs are barking; several dogs bark; two dogs bark",
    ),
    "ducks quacking": (
        "quacking ducks; several ducks; a group of ducks quacking; quacking; ducks",
        "ducks quack; several ducks quack; ducks are quacking",
    ),
    "frogs croaking": (
        "croaking frogs; a frog croaking; a group of frogs; croaking; frogs at a pond",
        "frogs croak; a frog croaks; several frogs croak; frogs are croaking",
    ),
    "a goat bleating": (
        "goats bleating; a goat baaing; the bleat of a goat; a bleat; a goat on a farm",
        "a goat bleats; a goat is bleating; a goat baas",
        "goats bleating; several goats; a goat bleating again and again",
    ),
    "flamingos calling": (
        "birds squawking; squawking birds; honking birds; geese honking; a flock of birds calling",
        "flamingos call; birds squawk; a flock of birds calls; birds honk",
    ),
    "a peacock calling": (
        "a peacock; a peacock's call; a peacock screaming; a bird squawking",
        "a peacock calls; a peacock cries",
    ),
    "a horse snorting": (
        "a snorting horse; a horse blowing; a horse's snort; a horse breathing out; a snort",
        "a horse snorts; a horse is snorting; a horse breathes out",
    ),
    "a pig squealing": (
        "a squealing pig; a pig's squeal; a squeal; a pig crying; pigs squealing",
        "a pig squeals; a pig is squealing; pigs squeal",
    ),
    "a pig grunting": (
        "a grunting pig; a pig oinking; a grunt; a hog grunting; pigs grunting",
        "a pig grunts; a pig oinks; a hog grunts; a pig is grunting",
    ),
    "a lion roaring": (
        "a roaring lion; a lion's roar; a roar; a big cat roaring; roaring",
        "a lion roars; a lion is roaring; a big cat roars",
    ),
    "a heavy gate closing": (
        "a stone gate closing; a heavy door closing; a large gate; a gate shutting; a big door shutting",
        "a heavy gate closes; a gate is closed; a heavy door shuts",
    ),
    "a heavy gate opening": (
        "a stone gate opening; a heavy door opening; a large gate; a gate being opened; a big door opening",
        "a heavy gate opens; a gate is opened; a heavy door opens",
    ),
    "a door slamming": (
        "a slamming door; a door slam; a door being slammed; a door shutting hard; a slam",
        "a door slams; someone slams a door; a door shuts with a bang",
        "doors slamming; a door slamming several times",
    ),
    "a river rushing": (
        "a rushing river; a fast stream; rapids; rushing water; a raging river; white water",
        "a river rushes; water rushes; a river is rushing by; water rushes down a river",
    ),
    "a snowstorm blowing": (
        "a blizzard; wind in a snowstorm; howling wind; strong wind blowing; a winter storm; wind blowing hard",
        "a snowstorm blows; the wind howls; the wind blows hard; strong wind blows; it is storming",
    ),
    "a telephone ringing": (
        "a phone ringing; a ringing telephone; a telephone ring; a ringing phone; an old telephone",
        "a telephone rings; a phone is ringing; the phone rings",
        "a telephone ringing several times; a phone ringing again and again",
    ),
    "a car crash": (
        "a crashing car; a car accident; a vehicle crashing; cars colliding; a collision",
        "a car crashes; cars collide; there is a car crash",
    ),
    "a car braking and skidding": (
        "tires squealing; a car skidding; tires screeching; a car braking; squealing tires",
        "a car skids; tires squeal; a car brakes hard; tires screech",
    ),
    "a car engine starting": (
        "a car starting; an engine starting; a vehicle engine starting up; a motor starting; a car being started",
        "a car starts; an engine starts; someone starts a car; a car engine starts up",
    ),
    "a train passing": (
        "a passing train; a train on tracks; a train going by; a train moving on rails; a train rolling",
        "a train passes; a train goes by; a train rolls on the tracks",
    ),
    "a siren": (
        "a police siren; an emergency vehicle siren; a siren wailing; an ambulance; a fire truck siren",
        "a siren wails; a siren sounds; an emergency vehicle siren blares",
    ),
    "wind chimes": (
        "chimes in the wind; a wind chime; tinkling chimes; small bells tinkling; chimes ringing",
        "wind chimes ring; chimes tinkle; small bells tinkle in the wind",
    ),
    "a heart beating": (
        "a beating heart; a heartbeat; heartbeats; a pulse; the beat of a heart",
        "a heart beats; a heart is beating",
        "heartbeats; a steady heartbeat",
    ),
}


def without_article(phrase):
    """
    >>> without_article("a dog barking")
    'dog barking'
    """
    article, _, rest = phrase.partition(" ")
    return rest if article in ("a", "an", "the") else phrase


def variants(caption, category, several=False):
    """What may be said of a sound in other words.

    Args:
        several (`bool`): whether the recording is heard more than once.

    Returns:
        `(list[str], list[str])`: phrases, of which the first is the caption and the second the category's plain name
        (the first again where the caption is the plain name), and clauses. All begin in lower case.

    Raises:
        ValueError: naming the caption or category, if there is nothing in the tables.
    """
    if caption not in VARIANTS:
        raise ValueError(f"`caption` has to be one of the library's, not {caption!r}.")
    if category not in CATEGORIES:
        raise ValueError(f"`category` has to be one of the library's, not {category!r}.")
    phrases, clauses, *plural = VARIANTS[caption]
    plain, *names = OTHER_CATEGORIES.get(caption, CATEGORIES[category]).split("; ")
    others = [*names, *phrases.split("; "), *(plural[0].split("; ") if several and plural else [])]
    others = [phrase for phrase in dict.fromkeys(others) if phrase not in (caption, plain)]
    return [caption, plain, *others], clauses.split("; ")


def widen(caption, category, several=False):
    """Captions to draw from uniformly: the given one about every fourth time, the category's plain name every seventh,
    the other variants, and forms of them with "the sound of", without the article and as written sentences."""
    phrases, clauses = variants(caption, category, several)
    _, plain, *others = phrases
    other, *_, last = [phrase for phrase in others if "sound" not in phrase]  # no "sound of a bell sound"
    forms = [*phrases, *clauses, *map(without_article, (caption, plain, last))]
    forms += [f"the sound of {phrase}" for phrase in (caption, plain, other)]
    forms += [f"a recording of {caption}", f"a recording of {last}", f"{caption} can be heard"]
    forms += [sentence_case(caption), sentence_case(clauses[0]) + "."]
    forms = list(dict.fromkeys(forms))
    return [caption] * (len(forms) // 4) + [plain] * (len(forms) // 8) + forms


def sentence_case(text):
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", nargs="?", default=Path(__file__).with_name("manifest.csv"), type=Path)
    with open(parser.parse_args().manifest, newline="", encoding="utf-8") as file:
        kinds = sorted({(row["category"], row["caption"]) for row in csv.DictReader(file)})
    for category, caption in kinds:
        print(f"{category}: {caption}")
        for text in dict.fromkeys(widen(caption, category, several=True)):
            print(f"    {text}")
