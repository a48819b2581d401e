"""What qwen-tiny-chat knows: tables in English and Chinese.

Each row gives the English form first and the Chinese one behind it.
"""

from __future__ import annotations

CONTINENTS = {
    "EU": ("Europe", "欧洲"),
    "AS": ("Asia", "亚洲"),
    "AF": ("Africa", "非洲"),
    "NA": ("North America", "北美洲"),
    "SA": ("South America", "南美洲"),
    "OC": ("Oceania", "大洋洲"),
}

_COUNTRIES = """
EU France 法国 Paris 巴黎
EU Germany 德国 Berlin 柏林
EU Italy 意大利 Rome 罗马
EU Spain 西班牙 Madrid 马德里
EU Portugal 葡萄牙 Lisbon 里斯本
EU Greece 希腊 Athens 雅典
EU Russia 俄罗斯 Moscow 莫斯科
EU Ukraine 乌克兰 Kyiv 基辅
EU Poland 波兰 Warsaw 华沙
EU Austria 奥地利 Vienna 维也纳
EU Hungary 匈牙利 Budapest 布达佩斯
EU Sweden 瑞典 Stockholm 斯德哥尔摩
EU Norway 挪威 Oslo 奥斯陆
EU Denmark 丹麦 Copenhagen 哥本哈根
EU Finland 芬兰 Helsinki 赫尔辛基
EU Iceland 冰岛 Reykjavik 雷克雅未克
EU Ireland 爱尔兰 Dublin 都柏林
EU Britain 英国 London 伦敦
EU Belgium 比利时 Brussels 布鲁塞尔
EU Switzerland 瑞士 Bern 伯尔尼
EU Romania 罗马尼亚 Bucharest 布加勒斯特
EU Bulgaria 保加利亚 Sofia 索非亚
EU Serbia 塞尔维亚 Belgrade 贝尔格莱德
EU Croatia 克罗地亚 Zagreb 萨格勒布
AS China 中国 Beijing 北京
AS Japan 日本 Tokyo 东京
AS Mongolia 蒙古 Ulaanbaatar 乌兰巴托
AS India 印度 Delhi 新德里
AS Pakistan 巴基斯坦 Islamabad 伊斯兰堡
AS Nepal 尼泊尔 Kathmandu 加德满都
AS Thailand 泰国 Bangkok 曼谷
AS Vietnam 越南 Hanoi 河内
AS Laos 老挝 Vientiane 万象
AS Indonesia 印度尼西亚 Jakarta 雅加达
AS Malaysia 马来西亚 Putrajaya 布城
AS Philippines 菲律宾 Manila 马尼拉
AS Iran 伊朗 Tehran 德黑兰
AS Iraq 伊拉克 Baghdad 巴格达
AS Turkey 土耳其 Ankara 安卡拉
AS Jordan 约旦 Amman 安曼
AS Lebanon 黎巴嫩 Beirut 贝鲁特
AS Qatar 卡塔尔 Doha 多哈
AS Oman 阿曼 Muscat 马斯喀特
AS Kazakhstan 哈萨克斯坦 Astana 阿斯塔纳
AS Uzbekistan 乌兹别克斯坦 Tashkent 塔什干
AF Egypt 埃及 Cairo 开罗
AF Morocco 摩洛哥 Rabat 拉巴特
AF Tunisia 突尼斯 Tunis 突尼斯市
AF Nigeria 尼日利亚 Abuja 阿布贾
AF Ghana 加纳 Accra 阿克拉
AF Kenya 肯尼亚 Nairobi 内罗毕
AF Ethiopia 埃塞俄比亚 Addis_Ababa 亚的斯亚贝巴
AF Uganda 乌干达 Kampala 坎帕拉
AF Rwanda 卢旺达 Kigali 基加利
AF Senegal 塞内加尔 Dakar 达喀尔
AF Angola 安哥拉 Luanda 罗安达
AF Zambia 赞比亚 Lusaka 卢萨卡
AF Sudan 苏丹 Khartoum 喀土穆
NA Canada 加拿大 Ottawa 渥太华
NA Mexico 墨西哥 Mexico_City 墨西哥城
NA Cuba 古巴 Havana 哈瓦那
NA Jamaica 牙买加 Kingston 金斯敦
NA Panama 巴拿马 Panama_City 巴拿马城
SA Brazil 巴西 Brasilia 巴西利亚
SA Argentina 阿根廷 Buenos_Aires 布宜诺斯艾利斯
SA Chile 智利 Santiago 圣地亚哥
SA Peru 秘鲁 Lima 利马
SA Colombia 哥伦比亚 Bogota 波哥大
SA Venezuela 委内瑞拉 Caracas 加拉加斯
SA Ecuador 厄瓜多尔 Quito 基多
SA Uruguay 乌拉圭 Montevideo 蒙得维的亚
OC Australia 澳大利亚 Canberra 堪培拉
OC Fiji 斐济 Suva 苏瓦
"""

_ELEMENTS = """
hydrogen 氢 H
helium 氦 He
carbon 碳 C
nitrogen 氮 N
oxygen 氧 O
sodium 钠 Na
magnesium 镁 Mg
aluminium 铝 Al
silicon 硅 Si
sulfur 硫 S
chlorine 氯 Cl
calcium 钙 Ca
iron 铁 Fe
copper 铜 Cu
zinc 锌 Zn
silver 银 Ag
tin 锡 Sn
gold 金 Au
mercury 汞 Hg
lead 铅 Pb
"""

_OPPOSITES = """
big small 大 小
hot cold 热 冷
long short 长 短
high low 高 低
fast slow 快 慢
old new 旧 新
good bad 好 坏
light dark 亮 暗
left right 左 右
up down 上 下
early late 早 晚
near far 近 远
open closed 开 关
full empty 满 空
strong weak 强 弱
wet dry 湿 干
thick thin 厚 薄
loud quiet 吵 静
"""

_WORDS = """
cat 猫
dog 狗
bird 鸟
fish 鱼
horse 马
cow 牛
sheep 羊
tiger 老虎
rabbit 兔子
apple 苹果
banana 香蕉
water 水
tea 茶
rice 米饭
bread 面包
milk 牛奶
sun 太阳
moon 月亮
star 星星
rain 雨
snow 雪
wind 风
fire 火
mountain 山
river 河
sea 海
tree 树
flower 花
book 书
door 门
house 房子
school 学校
friend 朋友
mother 妈妈
father 爸爸
teacher 老师
student 学生
doctor 医生
car 汽车
train 火车
day 天
night 夜晚
red 红色
blue 蓝色
green 绿色
white 白色
black 黑色
yellow 黄色
love 爱
time 时间
"""


def _rows(table: str) -> list[list[str]]:
    return [[cell.replace("_", " ") for cell in line.split()] for line in table.strip().splitlines()]


Pair = tuple[str, str]
"""A word in English and in Chinese."""

COUNTRIES: list[tuple[Pair, Pair, Pair]] = [
    ((country, country_zh), (capital, capital_zh), CONTINENTS[continent])
    for continent, country, country_zh, capital, capital_zh in _rows(_COUNTRIES)
]
"""(country, capital, continent)."""

ELEMENTS: list[tuple[Pair, str]] = [((name, name_zh), symbol) for name, name_zh, symbol in _rows(_ELEMENTS)]
"""(element, symbol)."""

OPPOSITES: list[tuple[Pair, Pair]] = [
    pair for a, b, a_zh, b_zh in _rows(_OPPOSITES) for pair in (((a, a_zh), (b, b_zh)), ((b, b_zh), (a, a_zh)))
]
"""(word, its opposite), in both directions."""

WORDS: list[Pair] = [(word, word_zh) for word, word_zh in _rows(_WORDS)]
"""Words and their translation."""
