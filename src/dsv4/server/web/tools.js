// Tools of the page: the calculator, which is computed here, and functions a person answers for.

export const CALCULATOR = {
  type: "function",
  function: {
    name: "calculator",
    description: "Evaluate an arithmetic expression",
    parameters: {
      type: "object",
      properties: { expression: { type: "string", description: "The expression" } },
      required: ["expression"],
    },
    strict: true, // a small model may write another name, which would be no call
  },
};

// The tools a conversation declares. Throws an Error that says what is wrong with the JSON.
export function declaredTools(settings) {
  return [...(settings.calculator ? [CALCULATOR] : []), ...parseTools(settings.tools ?? "")];
}

export function parseTools(text) {
  if (!text.trim()) return [];
  let list;
  try {
    list = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}`);
  }
  if (!Array.isArray(list)) throw new Error("Expected a list of functions: [{…}, {…}]");
  return list.map((entry, i) => {
    const found = entry?.function ?? entry;
    if (!/^[A-Za-z0-9_.:-]{1,128}$/.test(found?.name ?? "")) {
      throw new Error(`Function ${i + 1} needs a name of letters, digits and _`);
    }
    return { type: "function", function: found };
  });
}

// The result of a call that the page itself can answer, else null.
export function computedResult(call, settings) {
  if (!settings.calculator || call.function.name !== "calculator") return null;
  try {
    return evaluate(String(JSON.parse(call.function.arguments).expression ?? ""));
  } catch (error) {
    return `error: ${error.message}`;
  }
}

// Arithmetic without eval: + - * / % ^ ** and brackets. Whole numbers stay exact at any length.
export function evaluate(expression) {
  const tokens = expression.replaceAll("×", "*").replaceAll("÷", "/").replaceAll("−", "-").replaceAll(",", "")
    .match(/\*\*|[-+*/%^()]|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\S/g) ?? [];
  let at = 0;
  const next = () => tokens[at];
  const take = () => tokens[at++];

  function sum() {
    let value = product();
    while (next() === "+" || next() === "-") value = apply(take(), value, product());
    return value;
  }
  function product() {
    let value = signed();
    while (["*", "/", "%"].includes(next())) value = apply(take(), value, signed());
    return value;
  }
  function signed() {
    if (next() === "-") {
      take();
      return apply("*", -1n, signed());
    }
    if (next() === "+") take();
    return power();
  }
  function power() {
    const base = atom();
    if (next() !== "^" && next() !== "**") return base;
    take();
    return apply("^", base, signed());
  }
  function atom() {
    const token = take();
    if (token === "(") {
      const value = sum();
      if (take() !== ")") throw new Error("a bracket is missing");
      return value;
    }
    if (token === undefined) throw new Error("the expression ends too early");
    if (/^\d+$/.test(token)) return BigInt(token);
    if (/^[\d.]/.test(token) && Number.isFinite(Number(token))) return Number(token);
    throw new Error(`cannot compute “${token}”`);
  }

  const value = sum();
  if (at < tokens.length) throw new Error(`did not expect “${next()}”`);
  return typeof value === "bigint" ? value.toString() : String(Number(value.toPrecision(15)));
}

function apply(operator, a, b) {
  const zero = typeof b === "bigint" ? b === 0n : b === 0;
  if ((operator === "/" || operator === "%") && zero) throw new Error("division by zero");
  if (typeof a === "bigint" && typeof b === "bigint") {
    if (operator === "+") return a + b;
    if (operator === "-") return a - b;
    if (operator === "*") return a * b;
    if (operator === "/" && a % b === 0n) return a / b;
    if (operator === "%") return a % b;
    if (operator === "^" && b >= 0n && b * BigInt(a.toString(2).length) < 100_000n) return a ** b;
  }
  const [x, y] = [Number(a), Number(b)];
  const value = { "+": x + y, "-": x - y, "*": x * y, "/": x / y, "%": x % y, "^": x ** y }[operator];
  if (!Number.isFinite(value)) throw new Error("the result is too large");
  return value;
}
