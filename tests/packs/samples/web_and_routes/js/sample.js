export const sample = "web_and_routes";
